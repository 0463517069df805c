"""The style and the few lines of script of the report's HTML page."""

STYLE = """
:root { --page: #f5f6f8; --card: #fff; --ink: #1d2129; --soft: #5c6470; --line: #e2e5ea; --accent: #2a6fdb;
  --bad: #b3261e; --bad-page: #fdecea; --good: #0f7a4f; --good-page: #e7f5ee; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1115; --card: #16191f; --ink: #e8eaed; --soft: #9aa3af;
  --line: #2c313a; --accent: #7db1ff; --bad: #ff8a80; --bad-page: #33191a; --good: #5fd6a4; --good-page: #12291f; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .25rem; letter-spacing: -.005em; }
p { margin: .4rem 0; max-width: 78ch; }
.soft, figcaption { color: var(--soft); }
figure { margin: 1rem 0 0; }
figcaption { font-size: .86rem; max-width: 88ch; margin-top: .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem; }
.tiles { display: grid;
  grid-template-columns: repeat(auto-fit, minmax(235px, 1fr)); gap: .85rem; margin: 1.5rem 0 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
.tile span { display: block; font-size: .82rem; color: var(--soft); }
.tile .name { font-size: .78rem; margin-bottom: .15rem; }
.warning { background: var(--bad-page); border-color: transparent; color: var(--ink); margin: .85rem 0; }
.warning strong { color: var(--bad); }
.fine { background: var(--good-page); border-color: transparent; margin: .85rem 0; }
.fine strong { color: var(--good); }
.warning ul { margin: .35rem 0 0; padding-left: 1.15rem; }
.curve img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
tfoot td { color: var(--soft); border-top: 1px solid var(--line); border-bottom: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); display: block; font-size: .92em; line-height: 1.2; }
th[aria-sort], th button { cursor: pointer; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.best td { background: var(--good-page); }
.mark { font-size: .74rem; border-radius: 4px; padding: .08rem .38rem; margin-left: .35rem;
  border: 1px solid var(--line);
  color: var(--soft); white-space: nowrap; }
.mark.bad { color: var(--bad); background: var(--bad-page); border-color: transparent; }
td.marks { text-align: left; padding-left: 0; }
td.marks .mark { display: table; margin: 1px 0; }
.mark.good { color: var(--good); background: var(--good-page); border-color: transparent; }
details { margin-top: .7rem; }
summary { cursor: pointer; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.grid { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px .8rem; align-items: center;
  margin-top: .8rem; max-width: 940px; }
.grid img { width: 100%; display: block; image-rendering: pixelated; }
.grid .scale { font-size: .84rem; text-align: right; font-variant-numeric: tabular-nums; line-height: 1.25; }
.grid .scale .mark { display: table; margin: 2px 0 0 auto; }
.grid .labels { display: grid; grid-auto-columns: minmax(0, 1fr); grid-auto-flow: column; font-size: .72rem;
  color: var(--soft); text-align: center; overflow: hidden; }
.grid .labels span { overflow: hidden; text-overflow: ellipsis; }
pre { overflow-x: auto; font-size: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; margin: .6rem 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); max-width: 84ch; }
@media (max-width: 640px) { main { padding: 1.5rem .8rem 3rem; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .5rem; }
  .grid { gap: 2px .5rem; } .grid .labels span { font-size: .55rem; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").onclick = () => {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    body.append(...[...body.rows].sort((a, b) => up * (isNaN(key(a)) || isNaN(key(b)) ?
      key(a).localeCompare(key(b)) : key(a) - key(b))));
  });
}
"""
