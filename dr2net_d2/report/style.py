"""The style sheet of a report."""

STYLE = """
:root { --paper:#fff; --ink:#1c2126; --soft:#5a6570; --line:#d9dee3; --card:#f5f7f9; --link:#0072b2;
  --mark:#d55e00 }
@media (prefers-color-scheme: dark) { :root { --paper:#171b20; --ink:#e3e8ed; --soft:#9aa6b2;
  --line:#363e47; --card:#20262d; --link:#56b4e9; --mark:#f0762b } }
* { box-sizing:border-box }
html { scroll-padding-top:3.2rem; -webkit-text-size-adjust:100% }
body { margin:0 auto; max-width:76rem; padding:0 1.2rem 3rem; background:var(--paper);
  color:var(--ink); font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
  Arial,sans-serif }
a { color:var(--link) }
header { padding:1.6rem 0 .6rem }
h1 { margin:0; font-size:1.7rem; line-height:1.2; overflow-wrap:anywhere }
header p { margin:.5rem 0 0; color:var(--soft); overflow-wrap:anywhere }
nav { position:sticky; top:0; z-index:1; display:flex; gap:.2rem 1.1rem; overflow-x:auto;
  padding:.6rem 0; background:var(--paper); border-bottom:1px solid var(--line); font-size:.92rem;
  white-space:nowrap }
nav a { text-decoration:none }
h2 { margin:2.6rem 0 .8rem; font-size:1.3rem }
h3 { margin:0 0 .5rem; font-size:1rem }
p { max-width:48rem }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr)); gap:.6rem }
.tile { padding:.5rem .8rem; background:var(--card); border-radius:.5rem }
.tile span { display:block; color:var(--soft); font-size:.85rem; overflow-wrap:anywhere }
.tile b { font-size:1.35rem; font-variant-numeric:tabular-nums }
.tile.main { outline:2px solid var(--link) }
.counts, .note, footer, figcaption { color:var(--soft); font-size:.9rem }
.finding { padding:.5rem .9rem; border-left:4px solid var(--mark); background:var(--card) }
.table { overflow-x:auto; margin:1rem 0 }
table { border-collapse:collapse; font-size:.92rem; font-variant-numeric:tabular-nums }
th, td { padding:.32rem .8rem; border-bottom:1px solid var(--line); text-align:right;
  vertical-align:top }
th { color:var(--soft); font-weight:600 }
th:first-child, td:first-child { padding-left:0 }
td { white-space:nowrap }
.words { text-align:left; white-space:normal }
td.words + .words, td + td.words { min-width:11rem }
summary { cursor:pointer; color:var(--link) }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));
  gap:1rem 2rem; align-items:start }
figure { margin:0; min-width:0 }
.chart { overflow-x:auto }
.chart img { display:block; width:100%; max-width:36rem; height:auto }
.chart img.wide { max-width:none; width:max(100%,56rem) }
.legend { display:flex; flex-wrap:wrap; gap:.4rem 1.2rem; padding:.5rem .9rem; border-radius:.5rem;
  background:#3a424b; color:#fff; font-size:.9rem; max-width:none }
.legend span { display:inline-flex; align-items:center; gap:.45rem }
.legend i { width:1.3rem; height:1rem }
.sheet { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));
  gap:1.2rem }
.sheet img { display:block; width:100%; aspect-ratio:1; object-fit:contain; background:#000;
  border-radius:.4rem }
figcaption { padding-top:.35rem; overflow-wrap:anywhere; line-height:1.4 }
.full { display:none }
.full:target { display:flex; flex-direction:column; position:fixed; inset:0; z-index:2;
  background:#111; color:#fff }
.full p { margin:0; padding:.7rem 1rem; max-width:none }
.full a { color:#fff; margin-right:1rem; font-weight:600; white-space:nowrap }
.full div { flex:1; overflow:auto; min-height:0 }
.full img { display:block; margin:0 auto }
footer { margin-top:3rem; border-top:1px solid var(--line); padding-top:.8rem }
@media (max-width:30rem) { body { padding:0 .9rem 2rem } h2 { margin-top:2rem }
  th, td { padding:.3rem .55rem } }
@media print { :root { --paper:#fff; --ink:#000; --soft:#444; --line:#bbb; --card:#f3f3f3 }
  nav, .full { display:none !important } body { max-width:none; font-size:10pt }
  section > h2 { break-after:avoid } figure, tr, .tile { break-inside:avoid }
  .pair { grid-template-columns:1fr 1fr } .finding, h3 { break-after:avoid }
  .sheet { grid-template-columns:repeat(3,1fr) } .table { overflow:visible }
  * { print-color-adjust:exact } }
"""
