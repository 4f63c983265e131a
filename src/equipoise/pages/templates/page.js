for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
      };
      const order = (one, two) => {
        const [a, b] = [key(one), key(two)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no figure goes last
        const sign = up ? 1 : -1;
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
