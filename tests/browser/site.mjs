// The built book, served from this machine, and what its sources say should be in it.
import { createServer } from "node:http";
import { existsSync, readFileSync } from "node:fs";
import { dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = join(dirname(fileURLToPath(import.meta.url)), "../..");
export const PATIENCE = 180_000; // ms, for a machine that has much else to do
export const HTML = join(ROOT, "_build/html");

export const BROWSER = {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox", // a container's root has none
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", // nothing leaves this machine
    "--disable-background-networking",
  ],
};

const TYPES = {
  ".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".json": "application/json",
  ".png": "image/png", ".svg": "image/svg+xml", ".woff": "font/woff", ".woff2": "font/woff2",
};

const toc = readFileSync(join(ROOT, "_toc.yml"), "utf8");
const config = readFileSync(join(ROOT, "_config.yml"), "utf8");
export const CHAPTERS = [...toc.matchAll(/(?:root|file): *(\S+)/g)].map(([, name]) => `${name}.html`);
export const PAGES = [
  ...CHAPTERS,
  ...["search.html", "genindex.html"].filter((name) => existsSync(join(HTML, name))),
];

const repository = config.match(/url: *(\S+)/)[1].split("github.com/")[1];
const branch = config.match(/branch: *(\S+)/)[1];
export const COLAB = `https://colab.research.google.com/github/${repository}/blob/${branch}/`;

// A page can be asked for with a fault, `?fault=<p>…</p>`: HTML that is put at the end of its article.
export async function serve() {
  const server = createServer((request, response) => {
    const url = new URL(request.url, "http://localhost");
    const path = join(HTML, decodeURIComponent(url.pathname));
    if (!existsSync(path)) return response.writeHead(404).end();
    let body = readFileSync(path);
    const fault = url.searchParams.get("fault");
    if (fault) body = body.toString().replace("</article>", () => `${fault}</article>`);
    response.writeHead(200, { "content-type": TYPES[extname(path)] ?? "text/plain" }).end(body);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  return { address: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

// Ends the program if a chapter is not there.
export function demandBook() {
  const missing = CHAPTERS.find((name) => !existsSync(join(HTML, name)));
  if (!missing) return;
  console.error(`the book is not built, or not whole (${missing} is missing); run: fmn book --cached`);
  process.exit(1);
}
