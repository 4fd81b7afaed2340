// Not needed for reading: tables sort by a click on a heading, and everything is open in print.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) continue;
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
        if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
        return key(a).localeCompare(key(b), "en", { numeric: true });
      };
      const rows = [...body.rows].sort(compare);
      body.append(...(up ? rows : rows.reverse()));
    });
  });
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
