// numbers before texts, what has no value always last
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, body = row.closest("table").tBodies[0];
  const place = head.cellIndex, down = head.ariaSort === "ascending";
  const key = line => {
    const { n, s } = line.cells[place].dataset;
    return n !== undefined ? [0, Number(n)] : s !== undefined ? [1, s] : [2, 0];
  };
  const sign = down ? -1 : 1;
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a - b;
  const lines = [...body.rows].map(line => [key(line), line]);
  lines.sort(([[i, a]], [[j, b]]) => i === 2 || j === 2 ? i - j : sign * (i - j || compare(a, b)));
  body.append(...lines.map(([, line]) => line));
  for (const other of row.cells) other.ariaSort = "none";
  head.ariaSort = down ? "descending" : "ascending";
}));
