// Tables sort by the column whose button is pressed, and once more the other way.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.closest("th"), table = th.closest("table"), body = table.tBodies[0], i = th.cellIndex;
  const up = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && i < 2);
  const of = row => row.cells[i].dataset.v ?? row.cells[i].textContent, none = v => v === "" || v === "None";
  const rows = [...body.rows].sort((a, b) => {
    const x = of(a), y = of(b);
    if (none(x) || none(y)) return none(x) - none(y);
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
});
