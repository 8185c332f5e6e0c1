"""Style sheet of the HTML pages: light and dark, from phones to wide screens

Text colours have a contrast of at least 4.5 on their background, plot colours at least 3.
"""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59626e; --line: #e1e4e9; --paper: #fff; --panel: #f4f5f7;
        --kept: #2c68d4; --lost: #8b94a2; --mark: #b83a0a; --grid: #e9ebef }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9ca6b3; --line: #2c333b; --paper: #101418; --panel: #191f26;
          --kept: #6c9efc; --lost: #687382; --mark: #ff9a62; --grid: #222930 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem }
body { margin: 0 auto; padding: 2.2rem 1rem 5rem; max-width: 74rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
       overflow-wrap: break-word }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { margin: 0 0 .5rem; font-size: 1.25rem; letter-spacing: -.005em }
h3 { margin: 1.9rem 0 .5rem; font-size: 1rem }
section { margin-top: 2.6rem; padding-top: 1.3rem; border-top: 1px solid var(--line) }
p { margin: .3rem 0 .9rem; max-width: 46rem; overflow-wrap: anywhere }
.soft { color: var(--soft); font-size: .9rem }
small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.4; overflow-wrap: anywhere }
.key { font-family: ui-monospace, monospace; font-size: .68rem; user-select: all }
i { color: var(--soft) }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
code { color: var(--soft); font-weight: 400; overflow-wrap: anywhere }
pre { margin: .6rem 0; padding: .9rem; overflow-x: auto; background: var(--panel); border-radius: 6px }
summary { cursor: pointer }
mark { background: none; color: var(--mark); text-decoration: underline; text-underline-offset: .15em }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.4rem 0 0; font-size: .9rem }
td a { color: var(--kept) }
nav a { padding: .2rem 0; color: var(--kept); text-decoration: none }
nav a:hover, nav a:focus { text-decoration: underline }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 1rem; margin: 1.4rem 0 0 }
.figures dt { color: var(--soft); font-size: .8rem }
.figures dd { margin: 0; font-size: 1.4rem; font-weight: 600; letter-spacing: -.01em;
         font-variant-numeric: tabular-nums }

.wide { overflow-x: auto; margin: .4rem 0 1rem; background:  /* a shade where there is more to scroll to */
         linear-gradient(to right, var(--paper) 50%, transparent) left / 2rem 100% no-repeat local,
         linear-gradient(to left, var(--paper) 50%, transparent) right / 2rem 100% no-repeat local,
         linear-gradient(to right, var(--lost), transparent) left / .6rem 100% no-repeat scroll,
         linear-gradient(to left, var(--lost), transparent) right / .6rem 100% no-repeat scroll }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .38rem 1.3rem .38rem 0; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top }
th { color: var(--soft); font-size: .82rem; font-weight: 600; white-space: nowrap }
td { min-width: 9rem; max-width: 34rem; overflow-wrap: anywhere }
td:first-child { min-width: 0; white-space: nowrap }
td.number, th.number { min-width: 0; text-align: right; white-space: nowrap }
th:last-child, td:last-child { padding-right: 0 }
td .bar { width: 11rem; margin-top: .42rem }

svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums }
svg .kept { fill: var(--kept) } svg .lost { fill: var(--lost) } svg .hit { fill: transparent }
svg g:hover .hit { fill: var(--soft); fill-opacity: .14 }
svg .axis { stroke: var(--lost); stroke-width: 1 } svg .rule { stroke: var(--grid); stroke-width: 1 }
svg .mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3 }
svg text.marked { fill: var(--mark); font-weight: 600 }
svg .shade { fill: var(--mark); fill-opacity: .1 }
svg .line { fill: none; stroke: var(--kept); stroke-width: 1.6; stroke-linejoin: round }
svg .line.second { stroke: var(--mark) } svg .line.third { stroke: var(--lost) }
svg.bar { height: .66rem; border-radius: 2px; background: var(--panel); overflow: hidden }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.8rem 2rem;
         margin-top: 1rem }
.plot { margin: 0 } .plot h3 { margin: 0 0 .35rem; font-size: .92rem } .plot small { margin-top: .3rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; color: var(--soft); font-size: .85rem }
.legend svg { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; vertical-align: -.06rem }

.steps { margin: 1rem 0 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums }
.steps li { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr 6.5rem 4.6rem 6.5rem; gap: .1rem 1rem;
            align-items: center; padding: .45rem 0; border-bottom: 1px solid var(--line) }
.steps .count { text-align: right; font-weight: 600 }
.steps .share, .steps .minus { text-align: right; color: var(--soft) }
.steps .minus { white-space: nowrap }
.steps code { display: block; grid-column: 1 / -1 }

figure { margin: 0; min-width: 0 } figcaption { margin-top: .4rem; font-size: .85rem; line-height: 1.4 }
figcaption p { display: -webkit-box; margin: 0 0 .15rem; overflow: hidden; -webkit-box-orient: vertical;
         -webkit-line-clamp: 3 }
img { display: block; max-width: 100%; height: auto; border-radius: 4px } .pixels { image-rendering: pixelated }
.frame { display: flex; align-items: center; justify-content: center; aspect-ratio: 1; overflow: hidden;
         background: var(--panel);
         border-radius: 5px }
.frame img { width: 100%; height: 100%; object-fit: contain; border-radius: 0 }
.frame.none { border: 1px dashed var(--lost); background: none; color: var(--soft); font-size: .8rem;
         text-align: center }
.frame.none span { padding: .5rem; overflow-wrap: anywhere }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: 1.1rem .9rem;
         margin: .7rem 0 1.2rem }
.player video, .player audio { width: 100%; max-width: 17rem; display: block; margin-bottom: .4rem }
.player img { max-width: 100%; height: auto }
.gallery.pairs { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1.6rem }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem } .sides b { display: block; color: var(--soft);
         font-size: .78rem; font-weight: 600; margin-bottom: .2rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.6rem }
.cards figure { display: grid; grid-template-columns: 7.5rem 1fr; gap: 0 1rem } .cards figcaption { margin: 0 }
.strip > div { display: flex; flex-wrap: wrap; gap: .6rem } .strip > div > div { flex: 0 1 6.5rem; min-width: 4.4rem }
.sheet th, .sheet td { padding: .35rem .6rem .35rem 0; border: 0; vertical-align: middle }
.sheet td { min-width: 5.2rem; width: 7rem } .sheet thead th { vertical-align: bottom; white-space: normal }
.sheet th[scope=row] { position: sticky; left: 0; min-width: 9rem; max-width: 15rem; white-space: normal;
         background: var(--paper); color: var(--ink); font-weight: 400; text-align: left }
dl { margin: 0 } dt { color: var(--soft); font-size: .78rem } dd { margin: 0 0 .45rem; overflow-wrap: anywhere }
@media (max-width: 44rem) {
  html { scroll-padding-top: 3.4rem }
  body { padding-top: 1.3rem }
  nav { position: sticky; top: 0; z-index: 1; flex-wrap: nowrap; overflow-x: auto; margin: 1rem -1rem 0;
        padding: .5rem 1rem; background: var(--paper); border-bottom: 1px solid var(--line) }
  nav a { white-space: nowrap; padding: .35rem 0 }
  .steps li { grid-template-columns: 1fr auto 4rem } .steps .bar { grid-column: 1 / -1; grid-row: 2 }
  .steps .minus { grid-column: 1 / -1; grid-row: 3; text-align: left } .steps code { grid-row: 4 }
  th, td { padding-right: .9rem }
}
@media print { nav { display: none } section { break-inside: auto } }
"""
