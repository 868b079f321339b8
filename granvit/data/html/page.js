"use strict";
// A click on the head of a column sorts its table: the largest first, then the smallest, then as it was.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows].at(-1).cells;
  const key = (row, column) => {
    const cell = row.cells[column], given = cell.dataset.value;
    if (given === undefined) return cell.textContent.trim();
    return given === "" || Number.isNaN(Number(given)) ? null : Number(given);  // Python writes "nan" and "inf"
  };
  [...heads].forEach((head, column) => {
    const sort = () => {
      const order = { descending: "ascending", ascending: "none" }[head.ariaSort] ?? "descending";
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = order;
      const sign = order === "ascending" ? 1 : -1;
      const sorted = order === "none" ? rows : [...rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === null || y === null) return (x === null) - (y === null);  // what was not measured stays last
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
      });
      body.append(...sorted);
    };
    head.tabIndex = 0;
    head.ariaSort = "none";
    head.title = "sort by this column";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
