"use strict";
// Everything can be read without this: it sorts, filters, copies, and unfolds what a link or the printer needs.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => {
    const text = row.cells[k].textContent.trim();
    if (text === "" || text === "–") return null;
    const number = text === "inf" ? Infinity : Number(text.replace(/[,%]/g, ""));
    return Number.isNaN(number) ? text : number;
  };
  const order = (k, sign) => (a, b) => {
    const [x, y] = [value(a, k), value(b, k)];
    if (x === null || y === null) return (x === null) - (y === null); // what was not measured comes last
    if (typeof x === "number" && typeof y === "number") return sign * (x - y);
    return sign * String(x).localeCompare(String(y), "en", { numeric: true });
  };
  heads.forEach((head, k) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = original.some((row) => typeof value(row, k) === "number");
    const turns = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
    button.addEventListener("click", () => {
      const next = turns[turns.indexOf(head.ariaSort) + 1];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.ariaSort = next;
      const sign = next === "ascending" ? 1 : -1;
      body.append(...(next ? [...original].sort(order(k, sign)) : original));
    });
  });
}

for (const form of document.querySelectorAll("form.filter")) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const [text, only] = form.elements;
  const show = () => {
    const wanted = text.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const found = row.textContent.toLowerCase();
      row.hidden = (only.checked && !row.matches(".flagged")) || !wanted.every((word) => found.includes(word));
    }
    form.querySelector("output").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

for (const block of document.querySelectorAll("pre.copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    const code = block.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  block.append(button);
}

const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  target.hidden = false;
  for (let e = target; e; e = e.parentElement) if (e.matches("details")) e.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});
