// Looks how the import stands, twice a second, and draws it; when it has ended, the page itself tells the outcome.
"use strict";

const LOOK_MS = 500;
const LOOK_AGAIN_MS = 3000; // when the shop does not answer
const card = document.getElementById("import");
const [title, words, percent, bar, cancel] = ["title", "words", "percent", "bar", "cancel"].map((id) => document.getElementById(id));

function draw(state) {
  const known = state.fraction !== null;
  const done = Math.floor((state.fraction ?? 0) * 100);
  title.textContent = state.title;
  words.textContent = state.words;
  percent.textContent = known ? `${done} %` : "";
  bar.classList.toggle("unknown", !known && state.status === "START");
  bar.firstElementChild.style.width = `${done}%`;
  if (known) bar.setAttribute("aria-valuenow", done);
  cancel.disabled = state.cancel_requested;
}

async function look() {
  try {
    const answer = await fetch(card.dataset.state);
    if (answer.status === 404) return location.reload(); // signed out, or gone: the page says which
    const state = await answer.json();
    draw(state);
    if (state.ended) return setTimeout(() => location.reload(), LOOK_MS); // let the bar arrive
    setTimeout(look, LOOK_MS);
  } catch {
    words.textContent = "The shop does not answer at the moment. The import goes on; this page looks again by itself.";
    setTimeout(look, LOOK_AGAIN_MS);
  }
}

look();
