// Draws an image with boxes, masks and labels into a canvas as wide as its place.

// Okabe and Ito's colours, which also the colour-blind can tell apart; the darkest ones first.
const STAGE_COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2"];
const MASK_OPACITY = 0.4;
const MOST_OF_WINDOW = 0.8; // of its height

export function stageColour(stage) {
  return STAGE_COLOURS[stage % STAGE_COLOURS.length];
}

// Hues by the golden angle: neighbours among the classes differ most.
export function classColour(index) {
  const hue = (index * 137.508 + 205) % 360;
  return `hsl(${hue.toFixed(0)} 75% ${index % 2 ? 62 : 52}%)`;
}

// COCO's compressed RLE: numbers in 5 bits a character, from the third one on as the difference
// from the one before the last; they count, column by column, the pixels outside and inside in turn.
export function runsOf(counts) {
  const runs = [];
  let position = 0;
  while (position < counts.length) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = counts.charCodeAt(position++) - 48;
      value |= (code & 31) << shift;
      more = (code & 32) !== 0;
      shift += 5;
      if (!more && code & 16 && shift < 32) value |= -1 << shift;
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

// The image of a file turned upright by an EXIF orientation that the browser has ignored.
export async function upright(file, orientation) {
  const stored = await createImageBitmap(file, { imageOrientation: "none" });
  const { width, height } = stored, isTurned = orientation > 4;
  const canvas = document.createElement("canvas");
  canvas.width = isTurned ? height : width;
  canvas.height = isTurned ? width : height;
  const transforms = {
    2: [-1, 0, 0, 1, width, 0],
    3: [-1, 0, 0, -1, width, height],
    4: [1, 0, 0, -1, 0, height],
    5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, height, 0],
    7: [0, -1, -1, 0, height, width],
    8: [0, -1, 1, 0, 0, width],
  };
  const context = canvas.getContext("2d");
  context.setTransform(...transforms[orientation]);
  context.drawImage(stored, 0, 0);
  stored.close();
  return createImageBitmap(canvas);
}

function pathOf(mask) {
  const height = mask.size[0], path = new Path2D();
  let place = 0, inside = false;
  for (const run of runsOf(mask.counts)) {
    let from = place;
    place += run;
    while (inside && from < place) {
      const column = Math.floor(from / height), end = Math.min(place, (column + 1) * height);
      path.rect(column, from - column * height, 1, end - from);
      from = end;
    }
    inside = !inside;
  }
  return path;
}

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.image = null;
    this.shown = [];
    this.paths = new WeakMap();
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // Shows an ImageBitmap without detections.
  show(image) {
    this.image?.close();
    this.image = image;
    this.shown = [];
    this.canvas.hidden = false;
    this.draw();
  }

  // shown: {detection, colour, text} with the best score first; chosen: one of their detections.
  update(shown, { masks, labels, chosen }) {
    Object.assign(this, { shown, masks, labels, chosen });
    this.draw();
  }

  // The smallest shown box around a place of the page, as its detection.
  at(event) {
    const place = this.canvas.getBoundingClientRect(), scale = this.image.width / place.width;
    const x = (event.clientX - place.left) * scale, y = (event.clientY - place.top) * scale;
    const around = this.shown.map((s) => s.detection).filter(({ box }) =>
      box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
    const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
    return around.reduce((best, d) => (best && area(best) <= area(d) ? best : d), null);
  }

  draw() {
    if (!this.image) return;
    const { width, height } = this.image;
    const room = this.canvas.parentElement.clientWidth;
    const most = Math.max(1, window.innerHeight * MOST_OF_WINDOW);
    // Small images are enlarged, up to three times.
    const scale = Math.min(room / width, most / height, 3);
    const density = window.devicePixelRatio || 1;
    const canvas = this.canvas;
    canvas.style.width = `${width * scale}px`;
    canvas.style.height = `${height * scale}px`;
    canvas.width = Math.max(1, Math.round(width * scale * density));
    canvas.height = Math.max(1, Math.round(height * scale * density));
    const context = canvas.getContext("2d");
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    const factors = [canvas.width / width, canvas.height / height];
    const worstFirst = [...this.shown].reverse();
    if (this.masks) for (const one of worstFirst) this.drawMask(context, one, factors);
    for (const one of worstFirst) this.drawBox(context, one, factors, density);
    const labelled = this.shown.filter((s) => this.labels || s.detection === this.chosen);
    this.drawLabels(context, labelled, factors, density);
  }

  drawMask(context, { detection, colour }, [across, down]) {
    if (!detection.mask) return;
    if (!this.paths.has(detection)) this.paths.set(detection, pathOf(detection.mask));
    context.save();
    context.scale(across, down);
    context.globalAlpha = MASK_OPACITY;
    context.fillStyle = colour;
    context.fill(this.paths.get(detection));
    context.restore();
  }

  drawBox(context, { detection, colour }, [across, down], density) {
    const [x1, y1, x2, y2] = detection.box;
    const place = [x1 * across, y1 * down, (x2 - x1) * across, (y2 - y1) * down];
    const line = (detection === this.chosen ? 4 : 2) * density;
    // A dark rim, so that the colour is seen on every ground.
    context.lineWidth = line + 2 * density;
    context.strokeStyle = "rgb(0 0 0 / 55%)";
    context.strokeRect(...place);
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(...place);
  }

  // The best detection chooses its place first: above its box, below it, or inside; a label that
  // would hide another is left out, but never that of the chosen one.
  drawLabels(context, labelled, [across, down], density) {
    const size = (this.canvas.clientWidth < 500 ? 10 : 12) * density;
    const padding = 3 * density, high = size + 2 * padding;
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const { width, height } = context.canvas, taken = [];
    const isFree = ([x, y, w]) => taken.every(([a, b, c]) =>
      x + w <= a || a + c <= x || y + high <= b || b + high <= y);
    const order = [...labelled].sort((a, b) =>
      (b.detection === this.chosen) - (a.detection === this.chosen));
    for (const { detection, colour, text } of order) {
      const wide = Math.min(context.measureText(text).width + 2 * padding, width);
      const [left, top, , bottom] = detection.box;
      const x = Math.max(0, Math.min(left * across, width - wide));
      const places = [top * down - high, bottom * down, top * down, bottom * down - high]
        .map((y) => [x, Math.max(0, Math.min(y, height - high)), wide]);
      const place = places.find(isFree) ?? (detection === this.chosen ? places[0] : null);
      if (!place) continue;
      taken.push(place);
      context.fillStyle = colour;
      context.fillRect(place[0], place[1], wide, high);
      context.fillStyle = "#000000";
      context.fillText(text, place[0] + padding, place[1] + high / 2, wide - 2 * padding);
    }
  }
}
