"""A report's page and its style sheet: inline, for light and dark screens, from a phone to a wide monitor, and for print.

Plots are drawn for a white page; in the dark they are inverted with their hues kept, to the shade of their cards.
"""

from collections.abc import Sequence
from html import escape

CSS = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1f2328;--soft:#57606a;--line:#d8dce2;--base:#6e7781;--sft:#0072b2;
--ppo:#c04f00;--good:#0a7a53;--bad:#b3261e;--even:#57606a;--warn:#fff6dd;--warnline:#d9a400}
@media(prefers-color-scheme:dark){:root{--page:#0b0c0e;--card:#141414;--ink:#e8eaed;--soft:#a3abb5;--line:#33383f;
--base:#9aa3ad;--sft:#56b4e9;--ppo:#f0a35e;--good:#4cc38a;--bad:#ff8a80;--even:#a3abb5;--warn:#2b2410;--warnline:#b98c00}
img{filter:invert(.92) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:26px;line-height:1.2;margin:0 0 8px}
h2{font-size:19px;margin:40px 0 12px}
h3{font-size:13px;margin:0 0 4px;display:flex;justify-content:space-between;gap:8px;flex-wrap:wrap}
h3 span{font-weight:400;color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px}
a{color:var(--sft);text-decoration:none}a:hover{text-decoration:underline}
main{padding-bottom:60px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
small{display:block;font-size:12px;color:var(--soft);font-weight:400}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:inherit}
.fine{font-size:13px;color:var(--soft);max-width:85ch}
.verdict{font-size:17px;background:var(--card);border:1px solid var(--line);border-left:5px solid var(--even);
border-radius:8px;padding:14px 18px;margin:0 0 10px}
.better{border-left-color:var(--good)}.worse{border-left-color:var(--bad)}
.warning{background:var(--warn);border:1px solid var(--warnline);border-radius:8px;padding:10px 16px;margin:0 0 10px}
.warning::before{content:"⚠ "}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:10px;margin:14px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
dt{font-size:12.5px;color:var(--soft)}
dd{margin:0;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
img{display:block;max-width:100%;height:auto}
.bars{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.bars img{min-width:0;max-width:100%;object-fit:contain;background:#fff;border:1px solid #d8dce2;border-radius:8px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:8px 14px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
thead th{font-size:13px;color:var(--soft);font-weight:600}
tbody th{font-weight:500}
.numbers td,.numbers thead th{font-variant-numeric:tabular-nums;white-space:nowrap}
.lineage td:not(:last-child),.lineage code{white-space:nowrap}
.part th{padding-left:30px;color:var(--soft)}
.none{color:var(--soft)}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0 0 10px;overflow:hidden}
.prompt{padding:10px 14px;color:var(--soft);border-bottom:1px solid var(--line);font-size:14px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));font-size:14px}
.answers>div{padding:10px 14px;border-top:3px solid var(--base)}
.answers>.sft{border-top-color:var(--sft)}
.answers>.ppo,.answers>.dpo{border-top-color:var(--ppo)}.answers>.ppo_ema{border-top-color:#cc79a7}
em{color:var(--soft)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr));gap:10px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{width:100%}
figcaption{padding:0 12px 9px;font-size:12.5px;color:var(--soft)}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);margin-bottom:10px}
@media(max-width:600px){header,main{padding-left:12px;padding-right:12px}th,td{padding:7px 9px}
.bars{flex-wrap:nowrap;overflow-x:auto}.bars img{flex:none!important;max-width:none;height:250px}}
@media print{body{background:#fff}figure,article{break-inside:avoid}}
"""


def html_page(title: str, sections: Sequence[tuple[str, str, str]], more_css: str = "") -> str:
    """A whole page: `sections` are (anchor, heading, HTML) each, those without HTML are left out; `more_css` comes last."""
    shown = [(escape(anchor), escape(heading), body) for anchor, heading, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in shown)
    parts = "".join(f'<section id="{anchor}"><h2>{heading}</h2>{body}</section>' for anchor, heading, body in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{more_css}</style></head><body><header><h1>{escape(title)}</h1>"
        f"<nav>{links}</nav></header><main>{parts}</main></body></html>\n"
    )
