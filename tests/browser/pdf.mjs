// The whole book as one PDF, in its print style: _build/forget-me-not.pdf, or the file that is named.
import { join } from "node:path";
import { chromium } from "playwright-core";
import { pageCount } from "./checks.mjs";
import { BROWSER, CHAPTERS, PATIENCE, ROOT, demandBook, serve } from "./site.mjs";

export const BOOK = join(ROOT, "_build/forget-me-not.pdf");
const WITH_MATHS = "book/definitions.html"; // so that MathJax is there

// In the browser: puts all chapters in the place of the one that is open. Their own ids get the name of
// their page before them, and links between chapters lead to those ids.
async function joinChapters(chapters) {
  const name = (url) => new URL(url, location.href).pathname.slice(1);
  const anchor = (page, id) => `${page.replace(/\W/g, "-")}--${id}`;
  const target = document.querySelector("article.bd-article");
  const articles = [];
  const names = chapters.map((chapter) => name(`/${chapter}`));
  for (const chapter of chapters) {
    const address = new URL(`/${chapter}`, location.href);
    const text = await (await fetch(address)).text();
    const article = new DOMParser().parseFromString(text, "text/html").querySelector("article.bd-article");
    for (const still of article.querySelectorAll("noscript")) still.replaceWith(...still.childNodes); // what scripts draw is not on paper
    for (const gone of article.querySelectorAll("script, .headerlink, .copybtn")) gone.remove();
    for (const node of article.querySelectorAll("[id]")) node.id = anchor(name(address), node.id);
    for (const node of article.querySelectorAll("[src]")) node.src = new URL(node.getAttribute("src"), address);
    for (const link of article.querySelectorAll("a[href]")) {
      const to = new URL(link.getAttribute("href"), address);
      const inside = to.host === location.host && names.includes(name(to));
      const id = to.hash.slice(1) || "top";
      link.href = inside ? `#${anchor(name(to), decodeURIComponent(id))}` : to;
    }
    article.id = anchor(name(address), "top");
    article.classList.add("chapter");
    articles.push(article);
  }
  target.replaceWith(...articles);
  const contents = document.createElement("ol");
  contents.style.columns = 2;
  for (const article of articles.slice(1)) {
    const link = document.createElement("a");
    link.href = `#${article.id}`;
    link.textContent = article.querySelector("h1").firstChild.textContent;
    contents.appendChild(document.createElement("li")).append(link);
  }
  articles[0].append(contents);
  await window.MathJax.startup.promise;
  window.MathJax.typesetClear();
  await window.MathJax.typesetPromise(articles);
  await Promise.all([...document.images].map((image) => image.decode().catch(() => image.remove())));
  const ids = new Set([...document.querySelectorAll("[id]")].map((node) => node.id));
  return [...document.querySelectorAll('.chapter a[href^="#"]')]
    .map((link) => decodeURIComponent(link.hash.slice(1)))
    .filter((id) => id && !ids.has(id));
}

// Writes the PDF with `browser`; returns links that lead nowhere, and its pages.
export async function print(browser, address, path, chapters = CHAPTERS) {
  const page = await browser.newPage({ colorScheme: "light" });
  page.setDefaultTimeout(PATIENCE);
  await page.goto(`${address}/${WITH_MATHS}`, { waitUntil: "load" });
  const dead = await page.evaluate(joinChapters, chapters);
  await page.addStyleTag({ content: `
    .chapter { break-before: page; display: block !important; padding: 0 !important; }
    .chapter:first-of-type { break-before: auto; }
    @page { size: A4; margin: 16mm 15mm 18mm; @bottom-center { content: counter(page); font: 9pt sans-serif; } }` });
  const pdf = await page.pdf({ path, preferCSSPageSize: true, printBackground: true, outline: true, tagged: true });
  await page.close();
  return { dead, pages: pageCount(pdf) };
}

if (process.argv[1] === import.meta.filename) {
  demandBook();
  const path = process.argv[2] ?? BOOK;
  const { address, close } = await serve();
  const browser = await chromium.launch(BROWSER);
  const { dead, pages } = await print(browser, address, path);
  await browser.close();
  close();
  console.log(`${path}: ${pages} pages`);
  if (dead.length) console.error(`links that lead nowhere: ${[...new Set(dead)].join(", ")}`);
}
