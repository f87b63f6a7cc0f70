/* Filter of the claims ledger. The page is complete without it; the state is the query of the address, so that views can be linked. */
document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("ledger-filter");
  if (!form) return;
  const names = ["source", "verdict", "chapter", "words"];
  const entries = [...document.querySelectorAll(".claim-id[data-id]")].map((mark) => {
    const box = mark.closest(".claim");
    return { box, data: mark.dataset, words: box.textContent.toLowerCase() };
  });
  const sections = new Set(entries.map((entry) => entry.box.closest("section")));
  const count = document.getElementById("ledger-count");

  const fits = (entry, wanted) =>
    ["source", "verdict", "chapter"].every((name) => !wanted[name] || entry.data[name] === wanted[name]) &&
    wanted.words.toLowerCase().split(/\s+/).every((word) => entry.words.includes(word));

  function show() {
    const wanted = Object.fromEntries(names.map((name) => [name, form.elements[name].value.trim()]));
    let shown = 0;
    for (const entry of entries) {
      entry.box.hidden = !fits(entry, wanted);
      shown += !entry.box.hidden;
    }
    for (const section of sections) section.hidden = !section.querySelector(".claim:not([hidden])");
    count.textContent = `${shown} of ${entries.length} claims shown`;
    return wanted;
  }

  function remember() {
    const kept = Object.entries(show()).filter(([, value]) => value);
    const query = new URLSearchParams(kept).toString();
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
  }

  function restore() {
    const query = new URLSearchParams(location.search);
    for (const name of names) form.elements[name].value = query.get(name) || "";
    show();
  }

  /* A link to one claim wins over a filter that would hide it. */
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const box = target && target.closest(".claim");
    if (!box) return;
    if (box.hidden) {
      for (const name of names) form.elements[name].value = "";
      show();
    }
    box.scrollIntoView();
  }

  form.addEventListener("input", remember);
  form.addEventListener("change", remember);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(remember));
  /* links of the counts on this page change the filter without loading the page again */
  for (const link of document.querySelectorAll('a[href^="claims.html"]')) {
    const target = new URL(link.href);
    if (target.pathname !== location.pathname || target.hash) continue;
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      history.pushState(null, "", target.search || target.pathname);
      restore();
      form.scrollIntoView();
      form.elements.source.focus({ preventScroll: true });
    });
  }
  window.addEventListener("popstate", restore);
  window.addEventListener("hashchange", reveal);
  form.hidden = false;
  restore();
  reveal();
});
