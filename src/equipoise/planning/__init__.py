"""What a conversion will take, known from the donor's config.json and a short measurement."""
