// The slider over β: one line of every spectrum, and one row of the table, at a time.
for (const section of document.querySelectorAll("[data-slider]")) {
  const input = section.querySelector("input[type=range]"), output = section.querySelector("output");
  const labels = [...section.querySelectorAll("datalist option")].map(option => option.label);
  const rows = section.querySelectorAll("table.path tbody tr");
  const show = () => {
    const step = Number(input.value);
    output.textContent = labels[step];
    input.setAttribute("aria-valuetext", labels[step]);
    for (const line of section.querySelectorAll('[id*="-beta-"]')) line.classList.toggle("on", line.id.endsWith(`-beta-${step}`));
    rows.forEach((row, i) => row.classList.toggle("on", i === step));
  };
  input.addEventListener("input", show);
  show();
}

// Galleries. What `data` holds is told in convexhead/report/gallery.py.
const PALETTE = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [213, 94, 0], [86, 180, 233], [240, 228, 66], [60, 60, 60], [150, 90, 40], [170, 170, 170]];
const FOR = [178, 24, 43], AGAINST = [33, 102, 172];

function buffer(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

function startGallery(root, data) {
  const [h, w] = data.grid, s = h * w, c = data.classes.length, m = data.kept, K = data.heads + 1;
  const maps = new Int8Array(buffer(data.maps)), shown = new Int16Array(buffer(data.shown));
  const scales = new Float32Array(buffer(data.scales)), sums = new Float32Array(buffer(data.sums));
  const logits = new Float32Array(buffer(data.logits));
  const clusters = {head: new Uint8Array(buffer(data.clusters.head)), raw: new Uint8Array(buffer(data.clusters.raw))};
  const control = {};
  for (const select of root.querySelectorAll("[data-control]")) control[select.dataset.control] = select;
  const list = root.querySelector(".tiles"), tiles = [...list.querySelectorAll(".tile")], said = root.querySelector(".said");
  const panel = root.querySelector(".chosen"), large = panel.querySelector(".tokens"), largeSaid = panel.querySelector(".said");
  const cursor = panel.querySelector(".cursor");
  let chosen = -1, token = 0, lit = -1;  // image, token under the cursor, cluster that is lit

  const visible = () => tiles.filter(tile => !tile.parentElement.hidden);
  const head = () => Number(control.head.value);
  const nameOf = k => k ? `head ${k}` : "all heads";
  const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toPrecision(3);

  // The class that an image shows, −1 where it has none, and its place among the classes that are kept of the image.
  function classOf(i) {
    const wanted = control.class.value;
    if (wanted === "predicted") return data.images[i].predicted;
    if (wanted === "true") return data.images[i].label;
    if (wanted === "second") return shown[i * m + (shown[i * m] === data.images[i].predicted ? 1 : 0)];
    return Number(wanted);
  }
  function place(i, label) {
    for (let j = 0; j < m; j++) if (shown[i * m + j] === label) return i * m + j;
    return -1;
  }

  function paint(i, canvas) {
    const context = canvas.getContext("2d"), pixels = context.createImageData(w, h), mode = control.show.value;
    const at = place(i, classOf(i)), start = (at * K + head()) * s;
    for (let t = 0; t < s; t++) {
      let color = [0, 0, 0], alpha = 0;
      if (mode === "contributions" && at >= 0) {
        const value = maps[start + t];
        color = value > 0 ? FOR : AGAINST;
        alpha = 215 * Math.abs(value) / 127;
      } else if (clusters[mode]) {
        const cluster = clusters[mode][i * s + t];
        color = PALETTE[cluster];
        alpha = lit < 0 ? 150 : lit === cluster ? 220 : 25;
      }
      pixels.data.set([...color, alpha], 4 * t);
    }
    context.putImageData(pixels, 0, 0);
  }

  function words(i, t) {
    const label = classOf(i), at = place(i, label), mode = control.show.value;
    const where = `row ${Math.floor(t / w) + 1}, column ${t % w + 1}`;
    if (clusters[mode]) return `${where}: cluster ${clusters[mode][i * s + t] + 1} of ${data.clusters.n[mode === "head" ? 0 : 1]}`;
    if (label < 0) return `${where}: the true class was never seen in training`;
    if (at < 0) return `${where}: ${data.classes[label]} is not among the ${m} classes kept of this image`;
    const value = maps[(at * K + head()) * s + t] / 127 * scales[at * K + head()];
    return `${where}: ${signed(value)} to ${data.classes[label]} through ${nameOf(head())}`;
  }

  function redraw() {
    const mode = control.show.value;
    root.querySelector("[data-legend=contributions]").hidden = mode !== "contributions";
    root.querySelector("[data-legend=clusters]").hidden = !clusters[mode];
    list.classList.toggle("over", mode !== "image");
    tiles.forEach((tile, i) => {
      const right = data.images[i].label === data.images[i].predicted, which = control.which.value;
      tile.parentElement.hidden = which === "wrong" ? right : which === "right" ? !right : false;
      paint(i, tile.querySelector("canvas"));
    });
    if (visible().length && !visible().some(tile => tile.tabIndex === 0)) {
      for (const tile of tiles) tile.tabIndex = -1;
      visible()[0].tabIndex = 0;
    }
    detail();
  }

  // A row of a table: a button that sets a control, and numbers.
  function row(name, select, value, on, ...cells) {
    const tr = document.createElement("tr"), th = document.createElement("th"), button = document.createElement("button");
    th.scope = "row";
    button.type = "button";
    button.textContent = name;
    button.setAttribute("aria-pressed", on);
    button.addEventListener("click", () => {
      control[select].value = value;
      redraw();
      panel.querySelector(`[data-rows=${select === "class" ? "classes" : "heads"}] tr.on button`)?.focus();
    });
    th.append(button);
    tr.append(th);
    tr.classList.toggle("on", on);
    for (const text of cells) tr.insertCell().textContent = text;
    return tr;
  }

  function detail() {
    openPanel();
    if (chosen < 0) return;
    const i = chosen, label = classOf(i), at = place(i, label), own = logits.subarray(i * c, (i + 1) * c);
    const largest = Math.max(...own), total = own.reduce((sum, x) => sum + Math.exp(x - largest), 0);
    paint(i, large.querySelector("canvas"));
    const best = [...own.keys()].sort((a, b) => own[b] - own[a]).slice(0, 5);
    for (const extra of [data.images[i].label, label]) if (extra >= 0 && !best.includes(extra)) best.push(extra);
    panel.querySelector("[data-rows=classes]").replaceChildren(...best.map(k => row(
      data.classes[k] + (k === data.images[i].label ? " (true)" : ""), "class", String(k), k === label,
      signed(own[k]), `${(100 * Math.exp(own[k] - largest) / total).toFixed(1)}%`)));
    panel.querySelector("[data-title=heads]").textContent = label >= 0 ? `Through which heads: ${data.classes[label]}` : "Through which heads";
    panel.querySelector("[data-rows=heads]").replaceChildren(...(at < 0 ? [] : [...Array(K).keys()].map(k => row(
      nameOf(k), "head", String(k), k === head(), signed(sums[at * K + k])))));
    if (at >= 0 && data.intercept[label]) {
      const tr = document.createElement("tr"), th = document.createElement("th");
      th.scope = "row";
      th.textContent = "intercept";
      tr.append(th);
      tr.insertCell().textContent = signed(data.intercept[label]);
      panel.querySelector("[data-rows=heads]").append(tr);
    }
    moveTo(token);
  }

  function moveTo(t) {
    token = t;
    cursor.hidden = false;
    Object.assign(cursor.style, {left: `${100 * (t % w) / w}%`, top: `${100 * Math.floor(t / w) / h}%`, width: `${100 / w}%`, height: `${100 / h}%`});
    largeSaid.textContent = words(chosen, t);
  }

  // The panel opens below the row of the chosen image.
  function openPanel() {
    if (chosen < 0) return;
    panel.hidden = true;
    const row = visible().filter(tile => tile.offsetTop === tiles[chosen].offsetTop);
    (row.at(-1) ?? tiles[chosen]).parentElement.after(panel);
    panel.hidden = false;
  }

  function choose(i) {
    chosen = i;
    tiles.forEach((tile, k) => tile.setAttribute("aria-pressed", k === i));
    large.querySelector("img")?.remove();
    const image = tiles[i].querySelector("img");
    if (image) large.prepend(image.cloneNode());
    detail();
    panel.scrollIntoView({block: "nearest"});
  }

  function under(element, event) {
    const box = element.getBoundingClientRect();
    const x = Math.floor(w * (event.clientX - box.left) / box.width), y = Math.floor(h * (event.clientY - box.top) / box.height);
    return Math.min(h - 1, Math.max(0, y)) * w + Math.min(w - 1, Math.max(0, x));
  }
  function light(i, t) {
    const mode = control.show.value, cluster = clusters[mode] && i >= 0 ? clusters[mode][i * s + t] : -1;
    if (cluster === lit) return;
    lit = cluster;
    tiles.forEach((tile, k) => paint(k, tile.querySelector("canvas")));
    if (chosen >= 0) paint(chosen, large.querySelector("canvas"));
  }

  for (const select of Object.values(control)) select.addEventListener("input", redraw);
  tiles.forEach((tile, i) => {
    tile.addEventListener("click", () => choose(i));
    tile.addEventListener("pointermove", event => {
      const t = under(tile, event);
      said.textContent = `${data.images[i].file}, ${words(i, t)}`;
      light(i, t);
    });
    tile.addEventListener("pointerleave", () => light(-1, 0));
    tile.addEventListener("focus", () => { for (const other of tiles) other.tabIndex = other === tile ? 0 : -1; });
  });
  list.addEventListener("keydown", event => {
    const there = visible(), i = there.indexOf(document.activeElement);
    const across = there.filter(tile => tile.offsetTop === there[0].offsetTop).length;
    const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + across, ArrowUp: i - across, Home: 0, End: there.length - 1}[event.key];
    if (i < 0 || to === undefined) return;
    event.preventDefault();
    there[Math.min(there.length - 1, Math.max(0, to))].focus();
  });
  large.addEventListener("pointermove", event => { const t = under(large, event); moveTo(t); light(chosen, t); });
  large.addEventListener("pointerleave", () => light(-1, 0));
  large.addEventListener("keydown", event => {
    const x = token % w, y = Math.floor(token / w);
    const to = {ArrowRight: [x + 1, y], ArrowLeft: [x - 1, y], ArrowDown: [x, y + 1], ArrowUp: [x, y - 1]}[event.key];
    if (!to) return;
    event.preventDefault();
    moveTo(Math.min(h - 1, Math.max(0, to[1])) * w + Math.min(w - 1, Math.max(0, to[0])));
  });
  addEventListener("resize", openPanel);
  redraw();
}

for (const root of document.querySelectorAll("[data-gallery]")) startGallery(root, JSON.parse(document.getElementById(root.dataset.gallery).textContent));
