"""What leaves the machine: exports of converted models, and the cards that describe them."""
