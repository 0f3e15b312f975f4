// HTML that breaks a page in one way, and what the checks must say of it. They go into one page
// together, except those that would hide others.
import { DEAD } from "./explorer.mjs";
import { DEAD as DARK } from "./film.mjs";
import { COLAB } from "./site.mjs";

const MATHJAX = "/_static/mathjax/tex-chtml.js";
const ALT = "A description that is long enough for anybody.";
const PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";

export const FAULTS = [
  { fault: "<script>throw new Error('a fault')</script>", says: "error in a script: a fault" },
  { fault: "<script>console.error('a fault')</script>", says: "error in the console: a fault" },
  { fault: `<img src="/none.png" alt="${ALT}">`, says: "broken image: none.png" },
  { fault: `<img src="${PIXEL}">`, says: "image without a description" },
  { fault: `<img src="${PIXEL}" alt="../_images/plot.png, a file of the book">`, says: "image without a description" },
  { fault: `<img src="${PIXEL}" alt="${ALT}">`, says: "image without a numbered caption" },
  {
    fault: `<figure><img src="${PIXEL}" alt="${ALT}" style="--least: 400px; width: 100px !important"></figure>`,
    says: "letters too small",
  },
  { fault: "<table><tr><td>1</td></tr></table>", says: "table without a numbered caption" },
  { fault: "<table><tr><td>1</td></tr><tr><td>1</td><td>2</td></tr></table>", says: "table with rows of 1,2 cells" },
  {
    fault:
      "<div class='pst-scrollable-table-container'><table><caption><span class='caption-text' " +
      "style='max-width: none; width: 1300px'>A caption that is cut off</span></caption><tr><td>1</td></tr></table></div>",
    says: "caption wider than its page",
  },
  { fault: "<dl class='field-list'><dt>Type</dt><dd>Label noise</dd></dl>", says: "half of a description taken for a type" },
  { fault: "<h1>A second title</h1>", says: "2 headings of the first level" },
  { fault: "<p>{result}`label_noise.sym40.kf`</p>", says: "left in the text: {result}" },
  { fault: "<p>accuracy ?? percent</p>", says: "left in the text: ??" },
  { fault: "<p>accuracy nan percent</p>", says: "left in the text: nan" },
  { fault: "<div class='output'>&lt;Figure size 640x480&gt;</div>", says: "output: <Figure size" },
  { fault: "<span class='math'>x^2</span>", says: "maths is not shown: x^2" },
  { fault: "<p><span id='twice'></span><span id='twice'></span></p>", says: "two elements are called #twice" },
  { fault: "<p><a href='/book/none.html'>a page</a></p>", says: "link to a page that does not exist" },
  { fault: "<p><a href='/book/intro.html#none'>a place</a></p>", says: "link to no place on a page" },
  {
    fault: `<p><a href='${COLAB}notebooks/99.ipynb'>Colab</a></p>`,
    says: "Colab link to no notebook",
  },
  { fault: "<p style='width: 2000px'>wide</p>", says: "1280 px: scrolls sideways" },
  { fault: "<p style='width: 400px'>wide for a phone</p>", says: "375 px: scrolls sideways", alone: true },
  { fault: "<p style='color: #ccc; background: #fff'>Pale text that nobody can read.</p>", says: "color-contrast" },
  {
    fault: "<style>[data-theme=dark] .night { color: #333 !important }</style><p class='night'>Dark text at night.</p>",
    says: "dark: serious, color-contrast",
  },
  { fault: "<p><button></button></p>", says: "button-name" },
  { fault: "<img src='http://example.org/tracker.png' alt=''>", says: "asks another host: http://example.org" },
  {
    fault: "<script>document.querySelectorAll('.theme-switch-button').forEach((b) => b.remove())</script>",
    says: "no button for the theme",
    alone: true,
  },
  { fault: [1, 2, 3, 4].map((n) => `<script src="${MATHJAX}?${n}"></script>`).join(""), says: "the page weighs", alone: true },
  { fault: "<p><span class='caption-number'>Fig. 7 </span></p>", says: "Fig. 7 stands where Fig. 1 should" },
  {
    fault: "<p><span class='caption-number'>Fig. 1 </span><span class='caption-number'>Fig. 1 </span></p>",
    says: "Fig. 1 stands where Fig. 2 should",
    alone: true,
  },
];

// A script that runs before those of the explorer, or one that runs after them.
const before = (script) => `<script>${script}</script>`;
const after = (script) => before(`addEventListener("DOMContentLoaded", () => { ${script} })`);
const data = (change) =>
  before(`let given; Object.defineProperty(window, "fmnExplorer", { get: () => given, set(d) { ${change}; given = d } })`);

// The same for the forgetting explorer.
export const EXPLORER_FAULTS = [
  { fault: data("d.window = 0"), says: "accuracy of the mix" },
  { fault: data("d.predicted = d.predicted.replace(/A/g, 'B')"), says: "tiles forgotten", alone: true },
  { fault: data("d.forgotten[3] += 1"), says: "epoch 7, share 0%: forgotten", alone: true },
  { fault: data("delete d.probs"), says: DEAD, alone: true },
  { fault: after("document.querySelector('circle.then').remove()"), says: "the marker does not move" },
  { fault: after("document.querySelectorAll('.explorer label').forEach((l) => l.removeAttribute('for'))"), says: "the epoch has no label" },
  { fault: before("addEventListener('keydown', (e) => e.preventDefault(), true)"), says: "the keyboard does not move" },
  { fault: after("document.querySelector('.explorer [role=status]').removeAttribute('aria-live')"), says: "nothing is said of" },
  { fault: "<style>.explorer .tile { outline: none !important }</style>", says: "nothing but colour" },
  { fault: "<style>.explorer-key { font-size: 6px !important }</style>", says: "text of 6 px" },
  { fault: "<style>.explorer-still { display: none }</style>", says: "without scripts there is no picture" },
  { fault: "<style>.explorer .explorer-app[hidden] { display: block !important }</style>", says: "controls that do nothing" },
  { fault: "<style>.explorer button[hidden] { display: block !important }</style>", says: "although motion is to be reduced" },
  { fault: before("IntersectionObserver.prototype.observe = () => {}"), says: "nothing is mixed in by itself" },
];

const reel = (change) =>
  before(`let given; Object.defineProperty(window, "fmnFilm", { get: () => given, set(d) { ${change}; given = d } })`);

// The same for the film.
export const FILM_FAULTS = [
  { fault: reel("d.lost[40] += 50"), says: "epoch 40: area lost" },
  { fault: reel("d.right[7] += 50"), says: "epoch 7: area right", alone: true },
  { fault: reel("d.predicted = d.predicted.replace(/A/g, 'B')"), says: "area forgotten", alone: true },
  { fault: reel("d.border.reverse()"), says: "the true border is not drawn", alone: true },
  { fault: reel("delete d.points"), says: DARK, alone: true },
  { fault: after("document.querySelector('.film .gone').setAttribute = () => {}"), says: "cells tinted", alone: true },
  { fault: before("addEventListener('keydown', (e) => e.preventDefault(), true)"), says: "the keyboard does not move" },
  { fault: after("document.querySelector('.film [role=status]').removeAttribute('aria-live')"), says: "nothing is said of" },
  { fault: "<style>.film-key { font-size: 6px !important }</style>", says: "text of 6 px" },
  { fault: "<style>.explorer-still { display: none }</style>", says: "without scripts there is no picture" },
  { fault: "<style>.film button[hidden] { display: block !important }</style>", says: "although motion is to be reduced" },
  { fault: before("window.setInterval = () => 1"), says: "the film does not play", alone: true },
  { fault: before("window.clearInterval = () => {}"), says: "the film plays on after a pause", alone: true },
  { fault: after("document.querySelector('.film button').click()"), says: "the film plays by itself", alone: true },
  { fault: [1, 2].map((n) => `<script src="${MATHJAX}?/film/${n}"></script>`).join(""), says: "the film weighs", alone: true },
];

// For the cheat sheet, on paper.
export const SHEET_FAULTS = [
  { fault: "<p style='height: 20cm'>long</p>", says: "the cheat sheet is printed on 2 pages" },
  { fault: "<style>@page { size: letter }</style>", says: "the cheat sheet is not on A4 but on 612 x 792" },
];
