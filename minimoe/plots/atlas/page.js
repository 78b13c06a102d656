"use strict";
// The texts' tokens stand in the page in the colours of layer 0; this changes text, layer and expert, and explains a token.
(() => {
  const data = JSON.parse(document.getElementById("routes").textContent);
  const reader = document.getElementById("reader");
  const told = document.getElementById("told");
  const slider = document.getElementById("layer");
  const play = document.getElementById("play");
  const layers = Number(reader.dataset.layers), k = data.k;
  const figures = [...reader.querySelectorAll(".text")];
  const spans = figures.map((figure) => [...figure.querySelectorAll(".tokens > span")]);
  const tabs = [...reader.querySelectorAll("[data-text][aria-pressed]")];
  const experts = [...reader.querySelectorAll("[data-expert]")];
  let text = 0, layer = 0, expert = -1, token = -1, timer = 0;

  const element = (name, className, content) => {
    const made = document.createElement(name);
    made.className = className;
    made.textContent = content;
    return made;
  };

  function paintText(g) {
    const ids = data.texts[g].ids[layer];
    spans[g].forEach((span, n) => {
      const e = ids[n * k];
      span.className = `e${e}` + (e === expert ? " on" : "") + (g === text && n === token ? " at" : "");
      span.lastChild.textContent = e;
    });
    figures[g].querySelector(".of-layer").textContent = layer;
  }

  function paint() {
    paintText(text);
    figures.forEach((figure, g) => {
      figure.hidden = g !== text;
      figure.querySelector(".tokens").classList.toggle("chosen", expert >= 0);
    });
    tabs.forEach((tab, g) => tab.setAttribute("aria-pressed", String(g === text)));
    experts.forEach((chip, e) => chip.setAttribute("aria-pressed", String(e === expert)));
    document.getElementById("layer-shown").textContent = layer;
    if (slider) slider.value = layer;
    explain();
  }

  function explain() {
    told.replaceChildren();
    if (token < 0) {
      told.append("Point at a token, or press one: here stands where every layer sends it.");
      return;
    }
    const of = data.texts[text], piece = [...spans[text][token].childNodes].slice(0, -1).map((x) => x.textContent).join("");
    told.append(`token ${token} `, element("code", "", piece), ` in layer ${layer}: `);
    for (let slot = 0; slot < k; slot++) {
      const e = of.ids[layer][token * k + slot], weight = of.weights[layer][token * k + slot];
      const bar = element("span", `bar e${e}`, "");
      bar.style.width = `${Math.max(weight, 1) * 0.9}px`;
      told.append(element("span", `chip e${e}`, e), bar, `${weight} %  `);
    }
    const margin = of.margins[layer][token];
    if (margin >= 0) told.append(` · margin to the next choice ${(margin / 100).toFixed(2)}`);
    if (layers > 1) {
      told.append(document.createElement("br"), "first choices of all layers, from layer 0: ");
      for (let i = 0; i < layers; i++) {
        const e = of.ids[i][token * k];
        told.append(element("span", `chip e${e}`, e), " ");
      }
    }
  }

  function choose(changes) {
    ({ text = text, layer = layer, expert = expert, token = token } = changes);
    paint();
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    if (play) {
      play.setAttribute("aria-pressed", "false");
      play.textContent = "▶ play the layers";
    }
  }

  tabs.forEach((tab, g) => tab.addEventListener("click", () => choose({ text: g, token: -1 })));
  experts.forEach((chip, e) => chip.addEventListener("click", () => choose({ expert: e === expert ? -1 : e })));
  slider?.addEventListener("input", () => { stop(); choose({ layer: Number(slider.value) }); });
  play?.addEventListener("click", () => {
    if (timer) { stop(); return; }
    play.setAttribute("aria-pressed", "true");
    play.textContent = "■ stop";
    timer = setInterval(() => choose({ layer: (layer + 1) % layers }), 1100);
  });
  figures.forEach((figure, g) => {
    const tokens = figure.querySelector(".tokens"), places = new Map(spans[g].map((span, n) => [span, n]));
    const at = (event) => places.get(event.target.closest(".tokens > span")) ?? -1;
    for (const kind of ["mouseover", "click"]) {
      tokens.addEventListener(kind, (event) => { if (at(event) >= 0) choose({ token: at(event) }); });
    }
    tokens.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!step && !up) return;
      event.preventDefault();
      if (step) choose({ token: Math.min(Math.max(token + step, 0), spans[g].length - 1) });
      else { stop(); choose({ layer: Math.min(Math.max(layer + up, 0), layers - 1) }); }
    });
  });
  addEventListener("beforeprint", () => { // all texts are printed, and all that is folded away
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    figures.forEach((figure, g) => paintText(g));
  });

  reader.querySelectorAll(".controls, .hint, .told").forEach((one) => { one.hidden = false; });
  paint();
})();
