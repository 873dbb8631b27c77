// Plays a figure of class "kept": its layers, the scores, and the share of a box that one draws. Gives its state, which
// the figure that takes its place may go on with.
// Coordinates are those of the picture in the page. Without this script the last layer is there to be seen.
function play(figure, {layer, box = null, heat} = {}) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const one = selector => figure.querySelector(selector), all = selector => [...figure.querySelectorAll(selector)];
  const {entered, layers, views, colours} = data;
  const ranks = data.ranks && Uint8Array.from(atob(data.ranks), letter => letter.charCodeAt(0));
  const slider = one('[type=range]'), button = one('.play'), scores = one('[type=checkbox]');
  const pictures = all('.view svg'), bars = one('.bars'), line = bars.querySelector('polyline');
  const cells = views.flatMap((grids, view) => grids.flatMap(grid => cellsOf(grid, view)));
  const counts = Array.from({length: layers}, (_, layer) => entered.filter(n => n > layer).length);
  const own = views.map((_, view) => cells.filter(cell => cell.view === view));
  // A box is drawn by dragging, or by tapping two corners: a finger that drags up or down scrolls the page.
  let start = null, before = null, corner = null, timer = null;
  layer = Math.min(layer ?? layers - 1, layers - 1);
  if (scores) scores.checked = heat ?? scores.defaultChecked;

  function cellsOf({rows, columns, box: [left, top, right, bottom], tokens}, view) {
    const w = (right - left) / columns, h = (bottom - top) / rows, list = [];
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const place = row * columns + column, token = tokens ? tokens[place] : place;
      list.push({view, token, x: left + column * w, y: top + row * h, w, h});
    }
    return list;
  }

  function draw() {
    slider.value = layer;
    slider.setAttribute('aria-valuetext', `layer ${layer}, ${counts[layer]} visual tokens`);
    one('.count').textContent = `Layer ${layer}: ${counts[layer]} of ${entered.length} visual tokens`;
    pictures.forEach((svg, view) => {
      const heat = colours.map(() => ''), tokens = [...new Set(own[view].map(cell => cell.token))];
      const entering = tokens.filter(token => entered[token] > layer).length;
      svg.setAttribute('aria-label', `${data.names[view]}: ${entering} of ${tokens.length} visual tokens enter ` +
        `layer ${layer}; the arrow keys draw a box`);
      let left = '', edge = '';
      for (const {x, y, w, h, token} of own[view]) {
        const path = `M${round(x)} ${round(y)}h${round(w)}v${round(h)}h${round(-w)}z`;
        if (entered[token] > layer) {
          const rank = ranks ? ranks[layer * entered.length + token] : 255;
          if (rank < 255) heat[Math.floor(rank / 255 * colours.length)] += path;
          continue;
        }
        left += path;
        const stays = (right, down) => entered[tokenAt(view, x + (right + 0.5) * w, y + (down + 0.5) * h)] > layer;
        if (stays(-1, 0)) edge += `M${round(x)} ${round(y)}v${round(h)}`;
        if (stays(1, 0)) edge += `M${round(x + w)} ${round(y)}v${round(h)}`;
        if (stays(0, -1)) edge += `M${round(x)} ${round(y)}h${round(w)}`;
        if (stays(0, 1)) edge += `M${round(x)} ${round(y + h)}h${round(w)}`;
      }
      svg.querySelector('.left').setAttribute('d', left);
      svg.querySelector('.edge').setAttribute('d', edge);
      svg.querySelector('.heat').replaceChildren(...(scores && scores.checked ? heat : []).map((d, number) => {
        const path = document.createElementNS(svg.namespaceURI, 'path');
        path.setAttribute('d', d);
        path.setAttribute('fill', colours[number]);
        return path;
      }));
      const frame = svg.querySelector('.frame'), [x, y] = corner || [0, 0], mark = corner ? 15 : 0;
      const [l, t, r, b] = box || [x - mark, y - mark, x + mark, y + mark];
      Object.entries({x: l, y: t, width: r - l, height: b - t}).forEach(([name, value]) =>
        frame.setAttribute(name, value));
    });
    bars.querySelectorAll('rect').forEach((bar, number) => bar.classList.toggle('now', number === layer));
    if (scores) one('.legend').hidden = !scores.checked;
    share();
  }

  const round = value => +value.toFixed(2);

  function tokenAt(view, x, y) {
    for (const {rows, columns, box: [left, top, right, bottom], tokens} of views[view]) {
      const row = Math.floor((y - top) / (bottom - top) * rows);
      const column = Math.floor((x - left) / (right - left) * columns), place = row * columns + column;
      if (row >= 0 && row < rows && column >= 0 && column < columns) return tokens ? tokens[place] : place;
    }
  }

  function share() {
    const inside = box ? tokensIn(box) : [], of = n => inside.filter(token => entered[token] > n).length;
    line.setAttribute('points', inside.length === 0 ? '' : counts.map((_, n) =>
      `${10 * n},${100 - 100 * of(n) / inside.length} ${10 * n + 10},${100 - 100 * of(n) / inside.length}`).join(' '));
    const hint = matchMedia('(pointer: coarse)').matches ? data.touch : data.hint;
    one('.share').textContent = corner ? 'Now tap the opposite corner.' : !box ? hint : inside.length === 0 ? 'No visual token lies in the box.' :
      `Box (line): ${of(layer)} of its ${inside.length} tokens enter layer ${layer}, ` +
      `${Math.round(100 * of(layer) / inside.length)}%`;
  }

  function tokensIn([left, top, right, bottom]) {
    const of = test => [...new Set(cells.filter(({x, y, w, h}) => test(x + w / 2, y + h / 2, w, h))
      .map(cell => cell.token))];
    const x = (left + right) / 2, y = (top + bottom) / 2;
    const inside = of((u, v) => left <= u && u <= right && top <= v && v <= bottom);
    return inside.length ? inside : of((u, v, w, h) => Math.abs(u - x) <= w / 2 && Math.abs(v - y) <= h / 2);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = 'Play';
  }

  function show(number) {
    layer = Math.max(0, Math.min(layers - 1, number));
    draw();
  }

  button.onclick = () => {
    if (timer) return stop();
    if (layer === layers - 1) show(0);
    button.textContent = 'Pause';
    timer = setInterval(() => {
      show(layer + 1);
      if (layer === layers - 1) stop();
    }, Math.max(150, Math.min(600, 6000 / layers)));
  };
  slider.oninput = () => { stop(); show(+slider.value); };
  if (scores) scores.onchange = draw;
  bars.onclick = event => {
    const {left, width} = bars.getBoundingClientRect();
    stop();
    show(Math.floor((event.clientX - left) / width * layers));
  };

  const whole = data.size;
  const clipped = ([l, t, r, b]) => [Math.max(0, l), Math.max(0, t), Math.min(whole[0], r), Math.min(whole[1], b)];
  for (const svg of pictures) {
    const at = event => {
      const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      return [x, y];
    };
    const span = ([x, y], [u, v]) => {
      box = clipped([Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)]);
      if (box[2] - box[0] < 4 || box[3] - box[1] < 4) box = null;
      draw();
    };
    svg.onpointerdown = event => {
      if (!event.isPrimary) return;
      [start, before] = [{at: at(event), x: event.clientX, y: event.clientY, drags: false}, {box, corner}];
      svg.setPointerCapture(event.pointerId);
    };
    svg.onpointermove = event => {
      if (!start) return;
      start.drags ||= Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6;
      if (!start.drags) return;
      corner = null;
      span(start.at, at(event));
    };
    svg.onpointerup = event => {
      if (start && !start.drags && event.pointerType === 'touch') {
        const other = corner;
        [corner, box] = [other ? null : start.at, null];
        if (other) span(other, start.at); else draw();
      }
      start = null;
    };
    svg.onpointercancel = () => {  // the browser takes the gesture, to scroll
      if (start) ({box, corner} = before);
      start = null;
      draw();
    };
    svg.onclick = event => {
      if (event.detail === 2 && event.pointerType !== 'touch') { box = null; draw(); }
    };
    svg.onkeydown = event => {
      const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] || [];
      if (event.key === 'Escape') box = null;
      else if (dx === undefined) return;
      else if (!box) box = [0.35, 0.35, 0.65, 0.65].map((part, side) => part * whole[side % 2]);
      else {  // at the picture's edge it stays, as large as it was
        const step = [dx * whole[0] / 20, dy * whole[1] / 20].map((by, axis) =>
          Math.max(event.shiftKey ? by : -box[axis], Math.min(whole[axis] - box[axis + 2], by)));
        const moved = box.map((value, side) => side < 2 && event.shiftKey ? value : value + step[side % 2]);
        if (moved[2] - moved[0] >= 10 && moved[3] - moved[1] >= 10) box = moved;
      }
      corner = null;
      event.preventDefault();
      draw();
    };
  }

  one('.controls').hidden = false;
  draw();
  return {
    stop, get layer() { return layer; }, get box() { return box; }, get heat() { return !!scores && scores.checked; },
  };
}
