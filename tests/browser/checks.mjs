// What is wrong with a page: each check returns the problems that it found, as sentences.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { COLAB, HTML, ROOT } from "./site.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

const HEAVY = 1_500_000; // bytes of a page with all that it loads, as a server sends them

// Violations that are not the book's to mend, each with its reason.
const EXCUSED = [
  // docutils writes the bibliography as a list of roles that ARIA has since dropped.
  { selector: ".citation-list", rules: ["aria-required-children", "aria-allowed-role", "aria-deprecated-role"] },
  // Sphinx writes a signature of several lines as a list without terms.
  { selector: ".sig dl", rules: ["definition-list"] },
  // The theme's buttons and myst-nb's folded cells are named in other words than they show.
  { selector: ".theme-switch-button, .search-button__button, summary", rules: ["label-content-name-mismatch"] },
];

// Opens a page, and notes what it loads and what goes wrong meanwhile.
export async function open(context, url) {
  const page = await context.newPage();
  const problems = [];
  const loads = [];
  const host = new URL(url).host;
  page.on("request", (request) => {
    const { protocol, host: asked } = new URL(request.url());
    if (protocol.startsWith("http") && asked !== host) problems.push(`asks another host: ${request.url()}`);
  });
  page.on("response", (response) => {
    loads.push(response);
    if (response.status() >= 400) problems.push(`${response.status()} for ${response.url()}`);
  });
  page.on("pageerror", (error) => problems.push(`error in a script: ${error.message}`));
  page.on("console", (message) => {
    if (message.type() === "error") problems.push(`error in the console: ${message.text()}`);
  });
  await page.goto(url, { waitUntil: "load" });
  await page.evaluate(() => window.MathJax?.startup?.promise);
  return { page, problems, loads };
}

// What does not depend on colours or width.
export async function content(page, name) {
  const { problems, colab, links, captions } = await page.evaluate(readArticle);
  for (const href of colab) {
    const file = href.slice(COLAB.length);
    if (!href.startsWith(COLAB) || !existsSync(join(ROOT, file))) problems.push(`Colab link to no notebook: ${href}`);
  }
  if (name.startsWith("notebooks/")) {
    const source = name.replace(".html", ".ipynb");
    if (!colab.includes(COLAB + source)) problems.push("no link that opens the notebook in Colab");
  }
  for (const { path, anchor } of links) {
    const file = join(HTML, decodeURIComponent(path));
    if (!existsSync(file)) problems.push(`link to a page that does not exist: ${path}`);
    else if (anchor && !hasAnchor(file, anchor)) problems.push(`link to no place on a page: ${path}#${anchor}`);
  }
  return { problems, captions };
}

const anchors = new Map();
function hasAnchor(file, anchor) {
  if (!anchors.has(file)) {
    const ids = readFileSync(file, "utf8").matchAll(/\sid="([^"]+)"/g);
    anchors.set(file, new Set(Array.from(ids, ([, id]) => id)));
  }
  return anchors.get(file).has(decodeURIComponent(anchor));
}

// Runs in the browser.
function readArticle() {
  const problems = [];
  const article = document.querySelector("article") ?? document.querySelector("main");
  const all = (selector, where = article) => [...where.querySelectorAll(selector)];

  const titles = all("h1").length;
  if (titles !== 1) problems.push(`${titles} headings of the first level`);

  for (const image of all("img", document)) {
    const source = image.getAttribute("src").split("/").pop();
    if (image.complete && !image.naturalWidth) problems.push(`broken image: ${source}`);
    const alt = image.getAttribute("alt") ?? "";
    if (article.contains(image) && (alt.trim().length < 20 || /_images|\.png|\.svg/.test(alt)))
      problems.push(`image without a description: ${source}`);
    if (article.contains(image) && !image.closest("figure")?.querySelector("figcaption .caption-number"))
      problems.push(`image without a numbered caption: ${source}`);
  }
  for (const table of all("table:not(.indextable)")) {
    const caption = table.querySelector("caption") ?? table.closest("figure")?.querySelector("figcaption");
    if (!caption?.querySelector(".caption-number"))
      problems.push(`table without a numbered caption: ${table.innerText.trim().split("\n")[0]}`);
    const widths = [...table.rows].map((row) => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0));
    if (new Set(widths).size > 1 && !table.querySelector("[rowspan]"))
      problems.push(`table with rows of ${[...new Set(widths)]} cells: ${table.innerText.trim().split("\n")[0]}`);
  }

  for (const field of all("dl.field-list > dt", article))
    if (field.textContent.startsWith("Type")) problems.push(`half of a description taken for a type: ${field.nextElementSibling?.textContent}`);

  const copy = article.cloneNode(true);
  for (const code of all("pre, code, script, style, mjx-container", copy)) code.remove();
  const text = copy.textContent;
  const left = /\?\?|\{[a-z][\w:+-]*\}`?|<Figure size|np\.float|\bnan\b|\bundefined\b|\\\(|\$\$|\[object /g;
  for (const found of text.match(left) ?? []) problems.push(`left in the text: ${found}`);
  for (const bad of all(".problematic, .system-message, mjx-merror, [data-mjx-error]"))
    problems.push(`not resolved: ${bad.textContent.slice(0, 60)}`);
  for (const maths of all(".math")) {
    if (!maths.querySelector("mjx-container")) problems.push(`maths is not shown: ${maths.textContent.slice(0, 40)}`);
  }
  for (const pre of all(".output")) {
    if (/<Figure size|Traceback|\bnan\b/.test(pre.innerText)) problems.push(`output: ${pre.innerText.slice(0, 60)}`);
  }

  const ids = all("[id]", document).map((element) => element.id);
  const double = ids.find((id, index) => !id.startsWith("proof") && ids.indexOf(id) !== index); // sphinx-proof's repeat
  if (double) problems.push(`two elements are called #${double}`);

  const links = all("a[href]", document);
  const here = links.filter((link) => link.origin === location.origin);
  return {
    problems,
    captions: all(".caption-number").map((number) => number.textContent.trim()),
    colab: links.map((link) => link.href).filter((href) => href.includes("colab.research")),
    links: here.map((link) => ({ path: link.pathname, anchor: link.hash.slice(1) })),
  };
}

// Nothing makes the page itself wider than the window; what is wider scrolls in its own box.
export async function width(page) {
  return page.evaluate(() => {
    const { scrollWidth, clientWidth } = document.documentElement;
    const cut = [...document.querySelectorAll(".pst-scrollable-table-container .caption-text")]
      .filter((text) => text.getBoundingClientRect().right > text.closest("div").getBoundingClientRect().right + 1)
      .map((text) => `caption wider than its page: ${text.innerText.slice(0, 40)}`);
    if (scrollWidth <= clientWidth) return cut;
    const scrolls = (element) =>
      element && (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
    const wide = [...document.querySelectorAll("body *")]
      .filter((element) => element.getBoundingClientRect().right > clientWidth + 1 && !scrolls(element.parentElement))
      .map((element) => `${element.tagName.toLowerCase()}.${element.className}`);
    return [...cut, `scrolls sideways by ${scrollWidth - clientWidth} px: ${wide.slice(0, 3).join(", ")}`];
  });
}

// Pictures whose letters are too small to be read, by the least width that is written at them.
export async function letters(page) {
  return page.evaluate(() =>
    [...document.querySelectorAll('figure > img[style*="--least"]')]
      .map((image) => [image.clientWidth, Number.parseInt(image.style.getPropertyValue("--least"), 10), image.src])
      .filter(([shown, least]) => shown < least)
      .map(([shown, least, src]) => `letters too small: ${src.split("/").pop()} is ${shown} px wide, not ${least}`),
  );
}

const CONTRAST = "color-contrast"; // takes longer than all other rules together

// By all rules, by those of contrast alone, or by the others.
export async function accessibility(page, { contrast = true, others = true } = {}) {
  await page.evaluate(AXE);
  const options = { resultTypes: ["violations"] };
  if (!others) options.runOnly = [CONTRAST];
  if (!contrast) options.rules = { [CONTRAST]: { enabled: false } };
  const violations = await page.evaluate((words) => window.axe.run(document, words), options);
  const problems = [];
  for (const { id, impact, nodes } of violations.violations) {
    if (impact !== "serious" && impact !== "critical") continue;
    const excused = EXCUSED.filter(({ rules }) => rules.includes(id)).map(({ selector }) => selector);
    for (const { target, html } of nodes) {
      const known = await page.evaluate(
        ([where, selectors]) => selectors.some((s) => document.querySelector(where)?.closest(s)),
        [target.at(-1), excused],
      );
      if (!known) problems.push(`${impact}, ${id}: ${html.split("\n")[0].slice(0, 120)}`);
    }
  }
  return problems;
}

// No two captions share a number, and none is left out.
export function numbering(captions) {
  const problems = [];
  for (const kind of ["Fig.", "Table"]) {
    const numbers = captions.filter((caption) => caption.startsWith(kind));
    numbers.forEach((caption, index) => {
      if (caption !== `${kind} ${index + 1}`) problems.push(`${caption} stands where ${kind} ${index + 1} should`);
    });
    if (!numbers.length) problems.push(`the book has no ${kind}`);
  }
  return problems;
}

export async function search(page, address, term) {
  await page.goto(`${address}/search.html?q=${encodeURIComponent(term)}`);
  await page.getByText(/Search finished|did not match/).waitFor();
  const first = page.locator("#search-results li a").first();
  if (!(await first.count())) return [`search does not find "${term}"`];
  await first.click();
  await page.waitForLoadState();
  const text = await page.locator("article").innerText();
  const missing = term.split(" ").filter((word) => !text.toLowerCase().includes(word));
  return missing.length ? [`search for "${term}" leads to ${page.url()}, without ${missing}`] : [];
}

// The button goes round auto, light and dark; two presses change what is shown.
export async function theme(page) {
  const shown = () => page.evaluate(() => document.documentElement.dataset.theme);
  const button = page.locator(".theme-switch-button:visible").first();
  const before = await shown();
  const seen = new Set();
  for (let press = 0; press < 3; press++) {
    if (!(await button.count())) return ["there is no button for the theme"];
    await button.click();
    seen.add(await shown());
  }
  const after = await shown();
  return seen.has("light") && seen.has("dark") && before === after
    ? []
    : [`the button for the theme shows only ${[...seen]}`];
}

export const pageCount = (pdf) => pdf.toString("latin1").match(/\/Type\s*\/Page\b/g)?.length ?? 0;

// The cheat sheet is one page of A4.
export async function sheet(page) {
  const pdf = await page.pdf({ preferCSSPageSize: true, printBackground: true });
  const count = pageCount(pdf);
  const sizes = [...pdf.toString("latin1").matchAll(/\/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]/g)].map(([, ...size]) => size.map(Math.round).join(" x "));
  const problems = count === 1 ? [] : [`the cheat sheet is printed on ${count} pages`];
  if (sizes.some((size) => size !== "595 x 842")) problems.push(`the cheat sheet is not on A4 but on ${sizes}`);
  return problems;
}

// What a page loaded, in bytes, text compressed as every public host sends it.
export async function weight(loads) {
  let bytes = 0;
  for (const response of loads) {
    const text = /text|javascript|json|svg/.test(response.headers()["content-type"]);
    const body = await response.body();
    bytes += text ? gzipSync(body).length : body.length;
  }
  const problems = bytes > HEAVY ? [`the page weighs ${Math.round(bytes / 1000)} kB`] : [];
  return { bytes, problems };
}

// How many milliseconds after its first byte a page's explorer is there.
export async function wait(page, url) {
  await page.goto(url, { waitUntil: "commit" });
  const began = Date.now();
  await page.locator(".explorer-app").waitFor({ timeout: 10_000 });
  return Date.now() - began;
}
