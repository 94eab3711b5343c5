// Draws a small class-activation map as a smooth picture whose transparency is the map itself.

// Thirteen stops of the colours that the service's own pictures have (OpenCV's INFERNO).
const STOPS = [
  [0, 0, 4], [17, 10, 48], [50, 10, 94], [87, 16, 110], [120, 28, 109], [154, 40, 101], [188, 55, 84],
  [216, 76, 62], [237, 105, 37], [249, 140, 10], [252, 180, 24], [244, 223, 83], [252, 255, 164],
];
const SIDE = 192;

function colour(value) {
  const at = value * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((part, i) => part + (STOPS[low + 1][i] - part) * (at - low));
}

// Weights of the four neighbours in a Catmull-Rom spline: smooth where linear interpolation shows the cells.
function weights(t) {
  return [
    ((-t + 2) * t - 1) * t / 2, ((3 * t - 5) * t * t + 2) / 2, ((-3 * t + 4) * t + 1) * t / 2, (t - 1) * t * t / 2,
  ];
}

function resample(row, size) {
  const last = row.length - 1;
  return Float32Array.from({ length: size }, (_, i) => {
    const at = (i + 0.5) * row.length / size - 0.5;
    const base = Math.floor(at);
    return weights(at - base).reduce((sum, w, k) => sum + w * row[Math.max(0, Math.min(last, base - 1 + k))], 0);
  });
}

/** Fills `canvas` with the map `cam` (rows of numbers, 0 to 1) in the proportions of a width × height picture. */
export function drawHeat(canvas, cam, width, height) {
  const scale = SIDE / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const wide = cam.map((row) => resample(row, canvas.width));
  const context = canvas.getContext('2d');
  const picture = context.createImageData(canvas.width, canvas.height);
  for (let x = 0; x < canvas.width; x += 1) {
    const column = resample(wide.map((row) => row[x]), canvas.height);
    for (let y = 0; y < canvas.height; y += 1) {
      const value = Math.max(0, Math.min(1, column[y]));
      picture.data.set([...colour(value), 255 * value], 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(picture, 0, 0);
}
