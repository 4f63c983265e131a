// Tables sort by the heading that is pressed: up, down, as they came. What has no figure stays last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];

  const key = (row, column) => {
    const cell = row.cells[column];
    if ("value" in cell.dataset) return Number(cell.dataset.value);
    return "missing" in cell.dataset ? null : cell.textContent.trim();
  };
  const rank = (value) => (value === null ? 2 : typeof value === "string" ? 1 : 0);
  const compare = (column, sign) => (one, two) => {
    const [a, b] = [key(one, column), key(two, column)];
    if (rank(a) !== rank(b)) return rank(a) - rank(b);
    if (a === null) return 0;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  const next = { none: "ascending", ascending: "descending", descending: "none" };

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const order = next[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const rows = [...original];
      if (order !== "none") rows.sort(compare(column, order === "ascending" ? 1 : -1));
      body.append(...rows);
    });
  });
}

// On paper nothing can be opened.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => opened.forEach((part) => (part.open = false)));
