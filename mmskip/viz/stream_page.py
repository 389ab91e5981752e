"""One self-contained HTML page of a watched stream: frames with dropped tokens greyed by block, and what was said.

Shapes: F frames, N vision tokens per frame, G grid side with N = G * G or 1 + G * G, L blocks.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmskip.viz.figure import HIGHLIGHT, INK, LINE, RAN, SKIPPED

THUMBNAIL = 224
QUALITY = 72


def thumbnail(frame: np.ndarray, side: int = THUMBNAIL) -> str:
    """A frame, uint8 [H, W, 3], as a small JPEG in a data URL."""
    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid_of(tokens: int) -> int:
    """G of N vision tokens; 0: they are no square grid, with or without CLS."""
    for count in (tokens, tokens - 1):
        side = math.isqrt(count)
        if side and side * side == count:
            return side
    return 0


def stream_page(
    title: str,
    pictures: Mapping[int, str],
    times_s: Sequence[float],
    kept: Mapping[int, Mapping[str, Any]],
    tokens: int,
    spoken: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, str]],
) -> str:
    """The page.

    Args:
        title: of the video.
        pictures: data URLs by frame index, from `thumbnail`; frames without one are not shown.
        times_s: [F], seconds.
        kept: by frame index, by block: which of the N tokens it processed (any sequence of truth values); a frame
            without an entry kept all.
        tokens: N.
        spoken: dicts with `time_s`, `frame`, `text` and `question` (None: it spoke by itself).
        figures: (name, value) pairs for the table.

    Returns:
        HTML that needs no other file.
    """
    blocks = sorted({site for frame in kept.values() for site in frame}, key=_number)
    shown = sorted(pictures)
    data = {
        "frames": [
            {
                "t": round(times_s[i], 3),
                "i": i,
                "p": pictures[i],
                "k": [_bits(kept.get(i, {}).get(block), tokens) for block in blocks],
            }
            for i in shown
        ],
        "blocks": blocks,
        "tokens": tokens,
        "grid": grid_of(tokens),
        "end": round(float(times_s[-1]), 3) if len(times_s) else 0,
        "said": [{"t": s["time_s"], "i": s["frame"], "x": s["text"], "q": s.get("question")} for s in spoken],
    }
    rows = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in figures)
    values = {
        "TITLE": html.escape(title),
        "ROWS": rows,
        # a text must not be able to end the script it stands in, nor to open a comment or a script in it
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "RAN": RAN,
        "SKIPPED": SKIPPED,
        "INK": INK,
        "LINE": LINE,
        "HIGHLIGHT": HIGHLIGHT,
    }
    return re.sub("%([A-Z]+)%", lambda found: values[found[1]], _PAGE)


def _number(site: str) -> tuple[int, str]:
    digits = "".join(c for c in site if c.isdigit())
    return int(digits or 0), site


def _bits(kept: Any, tokens: int) -> str:
    return "1" * tokens if kept is None else "".join("1" if value else "0" for value in kept)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>%TITLE%</title><style>
:root{--ran:%RAN%;--skip:%SKIPPED%;--ink:%INK%;--line:%LINE%;--hot:%HIGHLIGHT%}
*{box-sizing:border-box}
body{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);max-width:1080px;
margin:0 auto;padding:22px 20px 40px;background:#fff}
h1{font-size:19px;font-weight:600;margin:0 0 2px}
.sub{color:#667784;margin:0 0 16px}
.top{display:grid;grid-template-columns:minmax(280px,440px) 1fr;gap:26px;align-items:start}
canvas{display:block;width:100%;border:1px solid var(--line);border-radius:4px}
label{display:grid;grid-template-columns:64px 1fr 150px;gap:10px;align-items:center;margin-top:9px}
input[type=range]{width:100%;accent-color:var(--ran);margin:0}
output{font-variant-numeric:tabular-nums;color:#44535f;white-space:nowrap}
#now{min-height:44px;margin:12px 0 0;padding:9px 12px;border-left:3px solid var(--line);background:#f7f9fa}
#now b{color:var(--hot);font-weight:600}
#said{margin:0;padding:0;list-style:none;max-height:530px;overflow-y:auto;border:1px solid var(--line);
border-radius:4px}
#said li{display:grid;grid-template-columns:58px 1fr;gap:8px;padding:5px 10px;cursor:pointer;
border-bottom:1px solid #eef1f3}
#said li:last-child{border:0}
#said li:hover{background:#f3f7f9}
#said li.on{background:#e4eff5}
#said time{color:#667784;font-variant-numeric:tabular-nums}
#said q{display:block;color:var(--hot);quotes:none}
h2{font-size:14px;font-weight:600;margin:0 0 7px}
#line{position:relative;height:66px;margin:24px 0 4px;border-bottom:1px solid var(--line)}
#line i{position:absolute;bottom:0;width:2px;margin-left:-1px;height:22px;background:var(--ran);cursor:pointer}
#line i.q{background:var(--hot);height:34px}
#line i:hover{height:44px}
#line s{position:absolute;bottom:0;width:1px;top:0;background:var(--ink)}
#ticks{position:relative;height:18px;color:#667784;font-size:12px;font-variant-numeric:tabular-nums}
#ticks span{position:absolute;transform:translateX(-50%)}
#strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:8px;margin-top:10px}
#strip figure{margin:0;cursor:pointer}
#strip figcaption{font-size:11px;color:#667784;font-variant-numeric:tabular-nums}
#strip .on canvas{outline:2px solid var(--hot)}
table{border-collapse:collapse;margin-top:8px}
th{font-weight:400;text-align:left;color:#667784;padding:3px 22px 3px 0}
td{font-variant-numeric:tabular-nums;padding:3px 0}
section{margin-top:26px}
@media(max-width:760px){.top{grid-template-columns:1fr}}
</style></head><body>
<h1>%TITLE%</h1><p class="sub" id="sub"></p>
<div class="top"><div>
<canvas id="big" width="448" height="448"></canvas>
<label>frame<input type="range" id="frame" min="0" value="0"><output id="oframe"></output></label>
<label>block<input type="range" id="block" min="0" value="0"><output id="oblock"></output></label>
<p id="now"></p></div>
<div><h2>What it said</h2><ul id="said"></ul></div></div>
<div id="line"></div><div id="ticks"></div>
<section><h2 id="hstrip"></h2><div id="strip"></div></section>
<section><h2>Figures</h2><table>%ROWS%</table></section>
<script>
const D=%DATA%;
const $=id=>document.getElementById(id),F=D.frames,G=D.grid,B=D.blocks.length;
const clock=t=>{const m=Math.floor(t/60),s=t-60*m;return m+":"+(s<10?"0":"")+s.toFixed(1)};
const imgs=F.map(f=>{const i=new Image();i.src=f.p;return i});
let frame=0,block=0;
// block 0 of the slider: all routed blocks together, a patch fading with each block that skips it
function share(f){const out=new Array(D.tokens).fill(1);if(!B)return out;
 for(let n=0;n<D.tokens;n++){
  if(block)out[n]=+f.k[block-1][n];else{let s=0;for(const k of f.k)s+=+k[n];out[n]=s/B}}
 return out}
function draw(canvas,j,cls){const c=canvas.getContext("2d"),img=imgs[j];if(!img.complete||!img.naturalWidth)return;
 canvas.height=Math.round(canvas.width*img.naturalHeight/img.naturalWidth);const w=canvas.width,h=canvas.height;
 c.drawImage(img,0,0,w,h);const s=share(F[j]);if(!G)return;const off=D.tokens-G*G;
 for(let r=0;r<G;r++)for(let q=0;q<G;q++){const v=s[off+r*G+q];if(v>=1)continue;
  const x=Math.floor(q*w/G),y=Math.floor(r*h/G),x2=Math.floor((q+1)*w/G),y2=Math.floor((r+1)*h/G);
  c.save();c.beginPath();c.rect(x,y,x2-x,y2-y);c.clip();c.globalAlpha=1-v;c.filter="grayscale(1)";
  c.drawImage(img,0,0,w,h);
  c.filter="none";c.fillStyle="rgba(206,211,215,.6)";c.fillRect(x,y,x2-x,y2-y);c.restore()}
 if(cls&&off){const on=s[0];c.fillStyle="rgba(255,255,255,.85)";c.fillRect(6,6,44,20);
  c.fillStyle=on>=1?"%RAN%":on>0?"#7fa6bd":"#98a4ad";c.font="12px sans-serif";c.fillText(on>0?"CLS ✓":"CLS –",11,20)}}
function blockName(){return !B?"nothing is routed":block?D.blocks[block-1]:"all "+B+" routed"}
function show(){const f=F[frame];$("frame").value=frame;$("block").value=block;draw($("big"),frame,true);
 $("oframe").textContent=f.i+" at "+clock(f.t);$("oblock").textContent=blockName();
 const upto=D.said.filter(s=>s.t<=f.t+1e-6),last=upto[upto.length-1],n=$("now");n.textContent="";
 if(last){const b=document.createElement("b");b.textContent=clock(last.t)+"  ";n.append(b,last.x||"(no words)")}
 else n.textContent="silent so far";
 [...$("said").children].forEach((li,j)=>li.classList.toggle("on",last===D.said[j]));
 [...$("strip").children].forEach((g,j)=>{g.classList.toggle("on",shown[j]===frame)});
 cursor.style.left=(D.end?100*f.t/D.end:0)+"%"}
function at(t){let best=0;F.forEach((f,j)=>{if(f.t<=t+1e-6)best=j});return best}
const cursor=document.createElement("s");
const step=Math.max(1,Math.ceil(F.length/40)),shown=F.map((f,j)=>j).filter(j=>j%step===0);
$("sub").textContent=F.length+" frames shown, "+D.said.length+" texts; patches that a block skipped are grey";
if(D.said.length)frame=at(D.said[0].t);
$("hstrip").textContent=step>1?"Frames, one in "+step:"Frames";
D.said.forEach(s=>{const li=document.createElement("li"),t=document.createElement("time");
 const d=document.createElement("div");
 t.textContent=clock(s.t);if(s.q){const q=document.createElement("q");q.textContent=s.q;d.append(q)}
 d.append(s.x||"(no words)");li.append(t,d);li.onclick=()=>{frame=at(s.t);show()};$("said").append(li);
 const i=document.createElement("i");i.style.left=(D.end?100*s.t/D.end:0)+"%";if(s.q)i.className="q";
 i.title=clock(s.t)+"  "+s.x;i.onclick=li.onclick;$("line").append(i)});
$("line").append(cursor);
for(let j=0;j<=4;j++){const e=document.createElement("span");e.style.left=25*j+"%";
 e.style.transform="translateX("+-25*j+"%)";e.textContent=clock(D.end*j/4);$("ticks").append(e)}
shown.forEach(j=>{const g=document.createElement("figure"),c=document.createElement("canvas");
 const p=document.createElement("figcaption");c.width=120;p.textContent=clock(F[j].t);
 g.append(c,p);g.onclick=()=>{frame=j;show()};$("strip").append(g)});
function strip(){[...$("strip").children].forEach((g,k)=>draw(g.firstChild,shown[k],false))}
$("frame").max=Math.max(F.length-1,0);$("block").max=B;$("block").disabled=!B;
$("frame").oninput=e=>{frame=+e.target.value;show()};
$("block").oninput=e=>{block=+e.target.value;show();strip()};
document.addEventListener("keydown",e=>{if(e.target.tagName==="INPUT")return;
 if(e.key==="ArrowRight"&&frame<F.length-1){frame++;show()}if(e.key==="ArrowLeft"&&frame){frame--;show()}});
Promise.all(imgs.map(i=>i.decode().catch(()=>0))).then(()=>{if(F.length){show();strip()}});
</script></body></html>
"""
