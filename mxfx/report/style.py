"""The style sheet of the report's page: system fonts, light and dark, from a phone's width to a 4k screen."""

CSS = """
:root {
  color-scheme: light dark;
  --back: #fbfbf9; --panel: #ffffff; --text: #1c1e21; --soft: #5c6370; --line: #dcdfe4;
  --accent: #2c5aa0; --bar: #d5e2f5; --add: #116329; --add-back: #e6f6ea; --cut: #a01c26; --cut-back: #fdecec;
  --low: #c0392b; --middle: #f2d06b; --high: #2a7f62;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --panel: #1d2024; --text: #e6e8eb; --soft: #9aa3af; --line: #343941;
    --accent: #8ab4f8; --bar: #2b3f5c; --add: #7ee2a0; --add-back: #14291b; --cut: #ff9a9a; --cut-back: #331a1c;
    --low: #b23b30; --middle: #a98a2c; --high: #2f8f70;
  }
}
* { box-sizing: border-box; }
html { font-size: clamp(14px, 11px + 0.35vw, 24px); -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 96rem; margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 3rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 0.2rem; padding-top: 1.2rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.5rem; }
p { margin: 0.2rem 0; max-width: 70em; }
.soft { color: var(--soft); font-size: 0.88rem; }
a { color: var(--accent); }
code, pre, .path { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.86em; }
.path { overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.4rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; font-size: 0.82rem; }
td.path { min-width: 11rem; } td.why { min-width: 13rem; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.name { font-weight: 600; white-space: nowrap; } td.brief { white-space: nowrap; }
td.bar { background: linear-gradient(to left, var(--bar) var(--share), transparent var(--share)); }
.tag { display: inline-block; padding: 0 0.5em; border-radius: 1em; border: 1px solid currentColor; font-size: 0.85em; }
.yes { color: var(--add); } .no { color: var(--cut); }
details { margin: 0.4rem 0; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--panel); }
summary { cursor: pointer; padding: 0.5rem 0.8rem; font-weight: 600; }
summary .soft { font-weight: 400; margin-left: 0.6em; }
details > :not(summary) { margin: 0 0.8rem 0.8rem; }
details .wide { border-radius: 0.3rem; }
pre { margin: 0; padding: 0.6rem; overflow: auto; max-height: 32rem; line-height: 1.45; }
pre span { display: block; white-space: pre; }
pre .add { color: var(--add); background: var(--add-back); } pre .cut { color: var(--cut);
  background: var(--cut-back); }
pre .place { color: var(--accent); font-weight: 600; margin-top: 0.6em; } pre .reads { color: var(--soft); }
.heat { display: grid; grid-template-columns: auto repeat(var(--layers), minmax(1.1rem, 1fr)); gap: 1px;
  padding: 0.6rem;
  min-width: calc(7rem + var(--layers) * 1.1rem); font-size: 0.72rem; }
.heat > span { padding-right: 0.6rem; text-align: right; white-space: nowrap; color: var(--soft); align-self: center; }
.heat > b { font-weight: 400; text-align: center; color: var(--soft); }
.heat > i { font-style: normal; min-height: 1.35rem; border-radius: 2px; text-align: center; line-height: 1.35rem;
  overflow: hidden; color: transparent;
  background: color-mix(in oklab, color-mix(in oklab, var(--low), var(--middle) calc(min(var(--v), 0.5) * 200%)),
    var(--high) calc(max(var(--v) - 0.5, 0) * 200%)); }
.heat > i.none { background: var(--line); }
.scale { display: flex; align-items: center; gap: 0.6rem; font-size: 0.85rem; color: var(--soft);
  padding: 0 0.6rem 0.6rem; }
.scale i { flex: 0 1 14rem; height: 0.7rem; border-radius: 3px;
  background: linear-gradient(to right in oklab, var(--low), var(--middle), var(--high)); }
@media (max-width: 40rem) {
  th, td { padding: 0.35rem 0.5rem; }
  details > :not(summary) { margin: 0 0.4rem 0.5rem; }
}
@media (min-width: 100rem) { .heat > i { color: #101418; } }
"""
