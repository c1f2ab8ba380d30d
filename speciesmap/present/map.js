/* The page around the map. Every string that comes from data enters through textContent. */
function speciesmapPage(map, parts) {
  "use strict";
  const data = JSON.parse(document.getElementById("sm-data").textContent);
  const byId = (id) => document.getElementById("sm-" + id);
  const layers = data.layers.map((facts, i) => {
    const overlay = parts.overlays[i];
    return { ...facts, overlay, pictures: [overlay._url, ...facts.months] };
  });
  const panel = byId("panel");
  document.body.prepend(panel); // Tab reaches the settings before hundreds of markers
  const narrow = window.matchMedia("(max-width: 680px)");
  const state = { shown: 0, beside: -1, share: 0.5, tiles: null, month: 0 };

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  /* Words that tell maps of one name apart, each only where it is needed. */
  const kinds = { taxon: "as learned", photo: "by photos", text: "in words" };
  const groups = [...new Set(layers.map((l) => l.query))];
  const several = groups.filter((query) => query !== "richness").length > 1;
  const quantities = [...new Set(layers.map((l) => l.quantity))];
  for (const layer of layers) {
    const others = layers.filter((l) => l !== layer && l.label === layer.label && l.query === layer.query);
    layer.apart = {
      kind: several && layer.query !== "richness" && (kinds[layer.query] || layer.query || "raster"),
      quantity: others.some((l) => l.quantity !== layer.quantity) && layer.quantity,
      file: others.some((l) => l.quantity === layer.quantity) && layer.file,
    };
  }

  function apart(layer, ...names) {
    return (names.length ? names : ["kind", "quantity", "file"])
      .map((name) => layer.apart[name]).filter(Boolean).join(", ");
  }

  function full(layer) {
    return apart(layer) ? `${layer.label} (${apart(layer)})` : layer.label;
  }

  function label(layer, small) {
    const name = make("span", layer.query === "taxon" ? "sm-label sm-taxon" : "sm-label", layer.label);
    if (small) name.append(make("small", "", small));
    return name;
  }

  function number(value, layer) {
    const span = layer.high - layer.low;
    const digits = Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(span) + 1e-9)));
    return value.toFixed(digits).replace("-", "\u2212");
  }

  function short(value, layer) {
    const text = number(value, layer);
    return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  }

  function range(layer) {
    return `${short(layer.low, layer)} to ${short(layer.high, layer)}`;
  }

  function capital(text) {
    return text.charAt(0).toUpperCase() + text.slice(1);
  }

  /* ---- values: a layer's PNG holds the numbers, 0 for none, 1 to 255 from low to high ---- */

  const seasonal = (layer) => layer.pictures.length > 1;
  const picture = (layer) => layer.pictures[seasonal(layer) ? state.month : 0];

  function pngBytes(url) {
    const text = atob(url.slice(url.indexOf(",") + 1));
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function chunks(bytes) {
    const view = new DataView(bytes.buffer);
    const found = [];
    for (let at = 8; at < bytes.length;) {
      const length = view.getUint32(at);
      const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
      found.push({ kind, at, body: bytes.subarray(at + 8, at + 8 + length) });
      at += length + 12;
    }
    return found;
  }

  const grids = new Map();

  function grid(url) {
    if (!grids.has(url)) {
      const body = chunks(pngBytes(url)).filter((c) => c.kind === "IDAT").map((c) => c.body);
      const stream = new Blob(body).stream().pipeThrough(new DecompressionStream("deflate"));
      grids.set(url, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
    }
    return grids.get(url);
  }

  async function stepAt(url, layer, latlng) {
    const at = L.CRS.EPSG3857.project(latlng);
    const [left, bottom, right, top] = layer.bounds_m;
    const round = 2 * Math.PI * 6378137;
    const x = at.x - left - Math.floor((at.x - left) / round) * round;
    const col = Math.floor(x / (right - left) * layer.width);
    const row = Math.floor((top - at.y) / (top - bottom) * layer.height);
    if (row < 0 || col >= layer.width || row >= layer.height) return 0;
    return (await grid(url))[row * (layer.width + 1) + 1 + col];
  }

  async function valueAt(layer, latlng, url = picture(layer)) {
    const step = await stepAt(url, layer, latlng);
    return step ? layer.low + (step - 1) / data.steps * (layer.high - layer.low) : null;
  }

  /* All that a map says of a place: its value, and the rest only where there is one. */
  async function tell(layer, latlng) {
    const value = await valueAt(layer, latlng);
    const year = seasonal(layer)
      ? await Promise.all(layer.pictures.map((url) => valueAt(layer, latlng, url))) : [];
    if (value === null) return { value, year: year.some((v) => v !== null) ? year : [] };
    const outside = layer.outside && await stepAt(layer.outside, layer, latlng) > 0;
    const step = layer.uncertainty && await stepAt(layer.uncertainty, layer, latlng);
    const uncertainty = step ? (step - 1) / data.steps * layer.uncertainty_high : null;
    return { value, year, outside, uncertainty };
  }

  function colourOf(share) {
    const at = Math.max(0, Math.min(1, share)) * (data.palette.length - 1);
    const i = Math.min(data.palette.length - 2, Math.floor(at));
    const part = (k) => {
      const [a, b] = [data.palette[i], data.palette[i + 1]].map((c) => parseInt(c.substr(k, 2), 16));
      return Math.round(a + (b - a) * (at - i));
    };
    return `rgb(${part(1)} ${part(3)} ${part(5)})`;
  }

  /* ---- hiding low values: the same PNG with another alpha per palette entry ---- */

  const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });

  function crc32(bytes) {
    let crc = 0xffffffff;
    for (const byte of bytes) crc = crcTable[(crc ^ byte) & 255] ^ (crc >>> 8);
    return (crc ^ 0xffffffff) >>> 0;
  }

  function cut(layer, share) {
    const url = picture(layer);
    const key = share > 0 ? `${share} ${state.month}` : url;
    if (layer.cut === key) return;
    layer.cut = key;
    const old = layer.blob;
    layer.blob = share > 0 ? URL.createObjectURL(hidden(url, share)) : null;
    layer.overlay.setUrl(layer.blob || url);
    if (old) URL.revokeObjectURL(old);
  }

  function hidden(url, share) {
    const bytes = pngBytes(url);
    const alpha = chunks(bytes).find((c) => c.kind === "tRNS");
    const first = 1 + Math.ceil(share * data.steps - 1e-9);
    alpha.body.fill(0, 0, first).fill(255, first);
    alpha.body[0] = 0;
    const checked = bytes.subarray(alpha.at + 4, alpha.at + 8 + alpha.body.length);
    new DataView(bytes.buffer).setUint32(alpha.at + 8 + alpha.body.length, crc32(checked));
    return new Blob([bytes], { type: "image/png" });
  }

  /* ---- which maps are on screen ---- */

  for (const [name, z] of [["sm-base", 250], ["sm-map", 350], ["sm-detail", 351], ["sm-beside", 352]]) {
    const pane = map.createPane(name);
    pane.style.zIndex = z;
    pane.style.pointerEvents = "none";
  }
  if (parts.base) parts.base.options.pane = "sm-base";
  if (parts.detail) parts.detail.options.pane = "sm-detail";
  map.createPane("sm-divider").style.zIndex = 450;
  map.getPane("sm-divider").append(byId("divider"));

  function place(layer, pane) {
    layer.overlay.remove();
    layer.overlay.options.pane = pane;
    layer.overlay.addTo(map);
    cut(layer, byId("threshold").value / 100);
    layer.overlay.setOpacity(byId("opacity").value / 100);
    crisp();
  }

  function crisp() {
    for (const [overlay, width] of visible()) {
      const image = overlay.getElement();
      if (image) image.style.imageRendering = image.clientWidth > width ? "pixelated" : "auto";
    }
  }

  function visible() {
    return [state.shown, state.beside].filter((i) => i >= 0)
      .map((i) => [layers[i].overlay, layers[i].width]);
  }

  function show(index) {
    const before = state.shown;
    if (index === state.beside) state.beside = before;
    else if (index !== before) layers[before].overlay.remove();
    state.shown = index;
    place(layers[index], "sm-map");
    if (state.beside >= 0) place(layers[state.beside], "sm-beside");
    const input = document.querySelector(`#sm-list input[value="${index}"]`);
    if (input) input.checked = true;
    legend();
    choices();
    divide();
    controls();
    observations();
  }

  function besideTo(index) {
    if (state.beside >= 0) layers[state.beside].overlay.remove();
    state.beside = index;
    if (index >= 0) place(layers[index], "sm-beside");
    controls();
    divide();
  }

  /* The first map's tiles in full resolution, where the page has them and nothing is cut. */
  function detail() {
    if (!parts.detail) return;
    const on = state.shown === 0 && Number(byId("threshold").value) === 0;
    parts.detail.setOpacity(byId("opacity").value / 100);
    if (on) parts.detail.addTo(map); else parts.detail.remove();
  }

  /* What is offered depends on the maps that are shown. */
  function controls() {
    detail();
    const shown = [state.shown, state.beside].filter((i) => i >= 0).map((i) => layers[i]);
    byId("year").hidden = !shown.some(seasonal);
    if (byId("year").hidden) play(false);
    byId("outside-row").hidden = !shown.some((layer) => layer.outside);
    hatch();
  }

  /* ---- months ---- */

  let playing = null;

  function month(at) {
    state.month = at;
    byId("month").value = at;
    byId("month").setAttribute("aria-valuetext", data.months[at]);
    byId("month-name").textContent = data.months[at];
    for (const i of [state.shown, state.beside]) {
      if (i >= 0 && seasonal(layers[i])) cut(layers[i], byId("threshold").value / 100);
    }
  }

  function play(on) {
    clearInterval(playing);
    playing = on ? setInterval(() => month((state.month + 1) % 12), 800) : null;
    byId("play").setAttribute("aria-pressed", on);
    byId("play").setAttribute("aria-label", on ? "Stop at this month" : "Play the months");
  }

  byId("play").addEventListener("click", () => play(!playing));
  byId("month").addEventListener("input", (event) => {
    play(false);
    month(Number(event.target.value));
  });

  /* ---- masked and hatched outside the area of applicability: lines as wide at every zoom ---- */

  const canvas = make("canvas");
  map.createPane("sm-hatch").style.zIndex = 353;
  map.getPane("sm-hatch").style.pointerEvents = "none";
  map.getPane("sm-hatch").append(canvas);

  function stripes(context, scale) {
    const side = 9 * scale;
    const tile = make("canvas");
    tile.width = tile.height = side;
    const ink = tile.getContext("2d");
    ink.fillStyle = "rgba(125, 134, 131, 0.78)";  // mutes the colours between the lines
    ink.fillRect(0, 0, side, side);
    for (const [colour, shift] of [["#101613", 0], ["#ffffff", 0.2]]) {
      ink.strokeStyle = colour;
      ink.lineWidth = 0.13 * side;
      ink.beginPath();
      for (const k of [-1, 0, 1, 2]) {
        ink.moveTo((k + shift) * side - side / 2, side * 1.5);
        ink.lineTo((k + shift) * side + side * 1.5, -side / 2);
      }
      ink.stroke();
    }
    return context.createPattern(tile, "repeat");
  }

  function mask(layer) {
    if (!layer.mask) {
      layer.mask = make("img");
      layer.mask.addEventListener("load", hatch);
      layer.mask.src = layer.outside;
    }
    return layer.mask.complete && layer.mask.naturalWidth ? layer.mask : null;
  }

  function hatch() {
    const shown = [[state.shown, 0, 1], [state.beside, 0, 1]].filter(([i]) => i >= 0);
    if (shown.length > 1) [shown[0][2], shown[1][1]] = [state.share, state.share];
    const wanted = shown.filter(([i]) => layers[i].outside && byId("outside").checked);
    canvas.hidden = !wanted.length;
    if (!wanted.length) return;
    const size = map.getSize();
    const scale = window.devicePixelRatio || 1;
    const corner = map.containerPointToLayerPoint([0, 0]).round();
    L.DomUtil.setPosition(canvas, corner);
    Object.assign(canvas, { width: size.x * scale, height: size.y * scale });
    Object.assign(canvas.style, { width: `${size.x}px`, height: `${size.y}px` });
    const context = canvas.getContext("2d");
    const pattern = stripes(context, scale);
    pattern.setTransform(new DOMMatrix().translate(-corner.x * scale, -corner.y * scale));
    for (const [i, from, to] of wanted) {
      const image = mask(layers[i]);
      if (!image) continue;
      const bounds = layers[i].overlay.getBounds();
      const nw = map.latLngToContainerPoint(bounds.getNorthWest()).multiplyBy(scale);
      const se = map.latLngToContainerPoint(bounds.getSouthEast()).multiplyBy(scale);
      context.save();
      context.beginPath();
      context.rect(from * canvas.width, 0, (to - from) * canvas.width, canvas.height);
      context.clip();
      context.fillStyle = pattern;
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "destination-in";
      context.imageSmoothingEnabled = false;
      context.drawImage(image, nw.x, nw.y, se.x - nw.x, se.y - nw.y);
      context.restore();
    }
  }

  byId("outside").addEventListener("change", hatch);
  map.on("zoomstart", () => { canvas.hidden = true; });
  map.on("move zoomend resize viewreset", hatch);

  const notes = {
    suitability: "Suitability is relative: higher means more like the places where it was "
      + "found. It is not the chance of finding it.",
    probability: "Probability is the chance that it is present, calibrated against the "
      + "prevalence that the model was given.",
    richness: "Richness is how many of the mapped taxa to expect there: the sum of their probabilities.",
  };

  function legend() {
    const layer = layers[state.shown];
    const name = byId("name");
    name.textContent = layer.label;
    name.classList.toggle("sm-taxon", layer.query === "taxon");
    byId("apart").textContent = capital(apart(layer, "kind", "file"));
    byId("caution").textContent = capital(layer.caution);
    byId("caution").hidden = !layer.caution;
    byId("quantity").textContent = capital(layer.quantity);
    byId("range").textContent = range(layer);
    byId("bar").style.background = `linear-gradient(to right, ${data.palette.join(", ")})`;
    byId("bar").setAttribute("aria-label", `Colour scale of ${layer.quantity}, from `
      + `${short(layer.low, layer)} in dark purple to ${short(layer.high, layer)} in yellow`);
    byId("ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((share) => make("span", "",
      short(layer.low + share * (layer.high - layer.low), layer))));
    byId("note").textContent = notes[layer.quantity] || "";
    byId("note").hidden = !notes[layer.quantity];
    threshold();
  }

  function threshold() {
    const share = byId("threshold").value / 100;
    const layer = layers[state.shown];
    const value = number(layer.low + share * (layer.high - layer.low), layer);
    byId("cut").style.width = `${share * 100}%`;
    byId("threshold-value").textContent = share > 0 ? value : "nothing";
    byId("threshold").setAttribute("aria-valuetext", share > 0 ? value : "nothing hidden");
  }

  /* ---- the list ---- */

  const headings = {
    taxon: "Species", photo: "Asked for by photos", text: "Asked for in words", richness: "Richness",
  };

  function list() {
    const rows = [];
    for (const query of groups) {
      if (groups.length > 1) {
        const heading = make("h2", "", headings[query] || "Other rasters");
        heading.dataset.query = query;
        rows.push(heading);
      }
      layers.forEach((layer, i) => {
        if (layer.query !== query) return;
        const row = make("label", "sm-row");
        const input = make("input");
        Object.assign(input, { type: "radio", name: "sm-layer", value: i, checked: i === 0 });
        input.addEventListener("change", () => show(i));
        row.append(input, label(layer, apart(layer, "quantity", "file")));
        layer.row = row;
        rows.push(row);
      });
    }
    byId("list").replaceChildren(...rows);
    byId("layers").hidden = layers.length < 2;
    byId("search").hidden = layers.length < 9;
    byId("search").placeholder = `Find one of ${layers.length} maps`;
  }

  function search() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const layer of layers) {
      const name = full(layer).toLowerCase();
      const fits = words.every((word) => name.includes(word));
      layer.row.hidden = !fits;
      count += fits;
    }
    for (const heading of document.querySelectorAll("#sm-list h2")) {
      heading.hidden = !layers.some((l) => l.query === heading.dataset.query && !l.row.hidden);
    }
    byId("none").hidden = count > 0;
    byId("none").textContent = count ? "" : "No map has this name.";
  }

  function choices() {
    const select = byId("compare");
    const options = [make("option", "", "nothing")];
    options[0].value = -1;
    layers.forEach((layer, i) => {
      if (i === state.shown) return;
      const option = make("option", "", full(layer));
      option.value = i;
      options.push(option);
    });
    select.replaceChildren(...options);
    select.value = state.beside;
    byId("compare-row").hidden = layers.length < 2;
  }

  /* ---- two maps side by side ---- */

  function divide() {
    const on = state.beside >= 0;
    const panes = ["sm-map", "sm-detail", "sm-beside"].map((name) => map.getPane(name));
    byId("divider").hidden = !on;
    for (const pane of panes) pane.style.clip = "";
    if (!on) return;
    const size = map.getSize();
    const [nw, se] = [map.containerPointToLayerPoint([0, 0]), map.containerPointToLayerPoint(size)];
    const x = Math.round(nw.x + size.x * state.share);
    for (const pane of panes) pane.style.clip = `rect(${nw.y}px, ${x}px, ${se.y}px, ${nw.x}px)`;
    panes[2].style.clip = `rect(${nw.y}px, ${se.x}px, ${se.y}px, ${x}px)`;
    Object.assign(byId("divider").style, { left: `${x}px`, top: `${nw.y}px`, height: `${size.y}px` });
    const [left, right] = [layers[state.shown], layers[state.beside]];
    const differ = left.quantity !== right.quantity || range(left) !== range(right);
    for (const [id, layer] of [["left", left], ["right", right]]) {
      const words = [apart(layer, "kind"), differ && `${layer.quantity}, ${range(layer)}`, apart(layer, "file")];
      byId(id).replaceChildren(label(layer, words.filter(Boolean).join(", ")));
    }
    byId("handle").setAttribute("aria-valuenow", Math.round(state.share * 100));
    byId("handle").setAttribute("aria-valuetext",
      `${full(left)} left, ${full(right)} right`);
  }

  function slide(share) {
    state.share = Math.max(0.02, Math.min(0.98, share));
    divide();
    hatch();
  }

  const handle = byId("handle");
  L.DomEvent.disableClickPropagation(handle);
  handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
  handle.addEventListener("pointermove", (event) => {
    if (handle.hasPointerCapture(event.pointerId)) {
      const box = map.getContainer().getBoundingClientRect();
      slide((event.clientX - box.left) / box.width);
    }
  });
  handle.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, Home: -1, End: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    slide(state.share + by);
  });

  /* ---- reading a place ---- */

  const pin = L.marker([0, 0], {
    icon: L.divIcon({ className: "sm-pin", iconSize: [14, 14] }), interactive: false, keyboard: false,
  });
  const degrees = (value, positive, negative) =>
    `${Math.abs(value).toFixed(5)}\u00b0 ${value < 0 ? negative : positive}`;

  function clear() {
    const left = narrow.matches ? 12 : panel.offsetWidth + 26;
    return { autoPanPaddingTopLeft: [left, 12], autoPanPaddingBottomRight: [56, 12] };
  }

  function months(year, layer) {
    const box = make("div", "sm-months");
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", data.months.map((name, k) =>
      `${name} ${year[k] === null ? "no value" : number(year[k], layer)}`).join(", "));
    year.forEach((value, k) => {
      const bar = make("div", k === state.month ? "sm-on" : "");
      const share = value === null ? 0 : (value - layer.low) / (layer.high - layer.low);
      bar.style.height = `${share * 100}%`;
      bar.style.background = colourOf(share);
      bar.title = data.months[k];
      box.append(bar);
    });
    return box;
  }

  /* A row for every map: the one that is shown, then the others, the highest first. */
  async function rows(latlng) {
    if (typeof DecompressionStream === "undefined") {
      return [make("p", "", "This browser is too old to read values; please update it.")];
    }
    const told = await Promise.all(layers.map((layer) => tell(layer, latlng)));
    if (told.every((t) => t.value === null && !t.year.length)) {
      return [make("p", "", "No map has a value here.")];
    }
    const share = (i) => told[i].value === null ? -1
      : (told[i].value - layers[i].low) / (layers[i].high - layers[i].low);
    const order = layers.map((_, i) => i).sort((a, b) =>
      (b === state.shown) - (a === state.shown) || share(b) - share(a) || a - b);
    return order.map((i) => {
      const { value, year, outside, uncertainty } = told[i];
      const layer = layers[i];
      const words = [apart(layer, "kind"), (quantities.length > 1 || layers.length === 1) && layer.quantity,
        apart(layer, "file"), uncertainty !== null && uncertainty !== undefined
          && `uncertainty ${number(uncertainty, layer)}`,
        outside && "extrapolated", seasonal(layer) && data.months[state.month]];
      const row = make("div", i === state.shown ? "sm-value sm-shown" : "sm-value");
      row.append(label(layer, words.filter(Boolean).join(", ")),
        make("b", "", value === null ? "no value" : number(value, layer)));
      if (year.length) row.append(months(year, layer));
      else if (value !== null) {
        const meter = make("div", "sm-meter");
        const fill = make("div");
        fill.style.width = `${Math.max(2, share(i) * 100)}%`;
        fill.style.background = colourOf(share(i));
        meter.append(fill);
        row.append(meter);
      }
      return row;
    });
  }

  /* Let an open popup show a box, and below it every map's value at a place once it is read. */
  async function fill(popup, box, latlng) {
    const body = make("div", "sm-values");
    body.tabIndex = 0;
    body.setAttribute("aria-busy", "true");
    body.append(make("p", "", "Reading the maps\u2026"));
    box.append(body);
    popup.setContent(box);
    body.replaceChildren(...await rows(latlng));
    body.removeAttribute("aria-busy");
    popup.update();
  }

  function read(latlng, cluster) {
    const at = latlng.wrap();
    const box = make("div", "sm-read");
    box.setAttribute("role", "status");
    box.append(make("p", "sm-place",
      `${degrees(at.lat, "N", "S")}, ${degrees(at.lng, "E", "W")}`));
    if (cluster) {
      const part = make("button", "sm-part", `Show these ${cluster.getChildCount()} observations`);
      part.type = "button";
      part.addEventListener("click", () => {
        map.closePopup();
        spread(cluster);
      });
      box.append(part);
    }
    const popup = L.popup({ ...clear(), maxWidth: 320, offset: [0, -4] }).setLatLng(latlng).openOn(map);
    pin.setLatLng(latlng).addTo(map);
    popup.on("remove", () => pin.remove());
    return fill(popup, box, latlng);
  }

  map.on("click", (event) => read(event.latlng));
  document.addEventListener("pointerdown", () => document.body.classList.remove("sm-keys"), true);
  map.getContainer().addEventListener("blur", () => document.body.classList.remove("sm-keys"));
  map.getContainer().addEventListener("keyup", (event) => {
    if (event.target === map.getContainer()) document.body.classList.add("sm-keys");
  });
  map.getContainer().addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === map.getContainer()) read(map.getCenter());
  });
  map.getContainer().setAttribute("role", "application");
  map.getContainer().setAttribute("aria-label", "Map. Arrow keys move it, plus and minus zoom, Enter reads the values at its centre.");

  /* ---- observations ---- */

  const records = data.observations;
  const names = records ? records.taxa.map((taxon) => taxon.toLowerCase()) : [];
  let markers = null;

  function record(at) {
    const box = make("div", "sm-record");
    box.append(make("p", "sm-taxon", records.taxa[records.taxon[at]]));
    const facts = make("dl");
    const add = (name, value) => value && facts.append(make("dt", "", name), make("dd", "", value));
    add("Date", records.date[at] || "unknown");
    add("Source", records.sources[records.source[at]]);
    add("Observer", records.observers[records.observer[at]]);
    add("Licence", records.licenses[records.license[at]]);
    if (records.uncertainty_m[at] !== null) add("Position", `within ${records.uncertainty_m[at]} m`);
    box.append(facts);
    const photo = records.photos[at];
    if (photo || records.thumbnails[at]) {
      const image = make("img", "sm-photo");
      image.alt = `Photo of ${records.taxa[records.taxon[at]]}`;
      image.referrerPolicy = "no-referrer";
      image.addEventListener("error", () => image.remove());
      image.src = records.thumbnails[at] || photo;
      box.append(image);
    }
    if (photo) {
      const link = make("a", "", "Photo (needs a network)");
      Object.assign(link, { href: photo, target: "_blank", rel: "noopener noreferrer" });
      box.append(link);
    }
    return box;
  }

  /* Zoom until a cluster parts; records of one place never do, and are fanned out. */
  function spread(cluster) {
    const bounds = cluster.getBounds();
    if (map.getZoom() >= map.getMaxZoom() || bounds.getSouthWest().equals(bounds.getNorthEast())) {
      const group = cluster._group;
      if (group._inZoomAnimation) group.once("animationend", () => spread(cluster));  // deaf so long
      else cluster.spiderfy();
    } else {
      cluster.zoomToBounds({ padding: [40, 40] });
    }
  }

  function observations() {
    if (!records) return;
    if (!markers) {
      const icon = L.divIcon({ className: "sm-dot", iconSize: [12, 12] });
      markers = records.at.map((at, i) => {
        const name = `${records.taxa[records.taxon[i]]}, ${records.date[i] || "date unknown"}`;
        return L.marker(at, { icon, title: name, alt: name }).bindPopup("", clear())
          .on("popupopen", (event) => fill(event.popup, record(i), L.latLng(at)));
      });
    }
    const own = layers[state.shown].label.toLowerCase();
    const filter = byId("own").checked && !byId("own-row").hidden;
    const wanted = markers.filter((_, i) => !filter || names[records.taxon[i]] === own);
    parts.cluster.clearLayers();
    if (byId("observations").checked) {
      parts.cluster.addLayers(wanted);
      parts.cluster.addTo(map);
    }
    const of = records.total > records.at.length ? ` of ${records.total}, drawn at random` : "";
    byId("observations-text").textContent = filter
      ? `Observations (${wanted.length} of this map)` : `Observations (${markers.length}${of})`;
  }

  if (records) {
    byId("observations-row").hidden = false;
    byId("own-row").hidden = records.taxa.length < 2
      || !layers.some((layer) => names.includes(layer.label.toLowerCase()));
    parts.cluster.options.iconCreateFunction = (cluster) => {
      const count = cluster.getChildCount();
      const side = count < 10 ? 24 : count < 100 ? 28 : count < 1000 ? 34 : 42;
      return L.divIcon({ className: "sm-cluster", iconSize: [side, side], html: String(count) });
    };
    parts.cluster.on("clusterclick", (event) =>
      read(map.mouseEventToLatLng(event.originalEvent), event.layer));
    parts.cluster.on("clusterkeypress", (event) => {
      if (event.originalEvent.key === "Enter") spread(event.layer);
    });
  }

  /* ---- controls ---- */

  byId("title").textContent = data.title;
  byId("search").addEventListener("input", search);
  byId("compare").addEventListener("change", (event) => besideTo(Number(event.target.value)));
  byId("opacity").addEventListener("input", opacity);
  byId("threshold").addEventListener("input", () => {
    threshold();
    for (const i of [state.shown, state.beside]) if (i >= 0) cut(layers[i], byId("threshold").value / 100);
    detail();
  });
  byId("observations").addEventListener("change", observations);
  byId("own").addEventListener("change", observations);

  function opacity() {
    const value = byId("opacity").value;
    byId("opacity-value").textContent = `${value}%`;
    for (const [overlay] of visible()) overlay.setOpacity(value / 100);
    detail();
  }

  function imagery() {
    const choice = byId("base").value;
    if (choice === "off") parts.base.remove(); else parts.base.addTo(map);
    map.getPane("sm-base").classList.toggle("sm-muted", choice === "muted");
    document.body.classList.toggle("sm-imagery", choice !== "off");
  }

  if (parts.base) {
    byId("base-row").hidden = false;
    byId("base").addEventListener("change", imagery);
    imagery();
  }

  data.tiles.forEach((name, i) => {
    const option = make("option", "", name);
    option.value = i;
    byId("tiles").append(option);
    parts.tiles[i].on("tileerror", () => { byId("offline").hidden = false; });
    parts.tiles[i].on("tileload", () => { byId("offline").hidden = true; });
  });
  byId("tiles").addEventListener("change", (event) => {
    if (state.tiles) state.tiles.remove();
    byId("offline").hidden = true;
    state.tiles = event.target.value === "" ? null : parts.tiles[Number(event.target.value)];
    if (state.tiles) state.tiles.addTo(map);
    if (state.tiles && parts.base) {
      byId("base").value = "off";
      imagery();
    }
  });

  const about = make("dl");
  for (const layer of layers) {
    const asked = { taxon: "learned embedding", photo: "photos", text: "words" }[layer.query];
    about.append(make("dt", "", layer.label), make("dd", "", [
      `${layer.quantity}, ${layer.file}`, asked && `asked for by ${asked}`,
      layer.model && `model ${layer.model.slice(0, 12)}`, layer.caution,
    ].filter(Boolean).join("; ")));
  }
  byId("about").append(make("p", "", "Each colour is the value of one cell of the map's GeoTIFF, "
    + "reduced where that has more cells than fit in this page, to the nearest 1/"
    + `${data.steps} of the range. Transparent means no value. Grey and hatched means that the imagery `
    + "there is unlike what the model was trained on, so that the value is extrapolated."), about);

  /* ---- the panel, and fitting the view beside it ---- */

  function open(on) {
    panel.classList.toggle("sm-closed", !on);
    byId("toggle").setAttribute("aria-expanded", on);
    byId("toggle").setAttribute("aria-label", on ? "Hide the settings" : "Show the settings");
  }

  byId("toggle").addEventListener("click", () => open(panel.classList.contains("sm-closed")));
  L.DomEvent.disableClickPropagation(panel);
  L.DomEvent.disableScrollPropagation(panel);
  open(!narrow.matches);
  narrow.addEventListener("change", () => open(!narrow.matches));

  let sheet = narrow.matches ? panel.offsetHeight : 0;
  new ResizeObserver(() => {
    const before = sheet;
    sheet = narrow.matches ? panel.offsetHeight : 0;
    document.documentElement.style.setProperty("--sheet", `${sheet}px`);
    if (sheet !== before) map.panBy([0, Math.round((sheet - before) / 2)], { animate: false });
  }).observe(panel);

  function fit() {
    map.invalidateSize(false);
    const [left, bottom] = narrow.matches ? [10, panel.offsetHeight + 34] : [panel.offsetWidth + 30, 44];
    map.fitBounds(data.extent, {
      paddingTopLeft: [left, narrow.matches ? 10 : 24], paddingBottomRight: [narrow.matches ? 10 : 60, bottom],
      animate: false,
    });
  }

  L.control.scale({ imperial: false, maxWidth: 140, position: narrow.matches ? "bottomleft" : "bottomright" }).addTo(map);
  map.attributionControl.setPrefix("");
  map.attributionControl.addAttribution(data.attribution);
  map.on("move resize zoomend viewreset", divide);
  map.on("zoomend", crisp);
  list();
  month(0);
  const wanted = Number(location.hash.slice(1));
  fit();
  show(layers[wanted] ? wanted : 0);
  opacity();
  sheet = narrow.matches ? panel.offsetHeight : 0;
  fit();
  window.speciesmap = { map, data, layers, state, show, compare: besideTo, month, read, valueAt, fit };
}
