// Text files as context: read, checked, refused with a reason.

const LARGEST = 512 * 1024;

/** {added: [{name, text}], refused: [reason]} */
export async function addFiles(list) {
  const added = [];
  const refused = [];
  for (const file of list) {
    if (file.size > LARGEST) {
      refused.push(`${file.name}: larger than ${LARGEST / 1024} KB`);
      continue;
    }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) throw new TypeError("binary");
      added.push({ name: file.name, text });
    } catch {
      refused.push(`${file.name}: not a text file in UTF-8`);
    }
  }
  return { added, refused };
}

/** Show `overlay` while files are dragged over the page; hand dropped ones to `take`. */
export function watchDrops(overlay, take) {
  let depth = 0;
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (!holdsFiles(event)) return;
    depth += 1;
    overlay.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!holdsFiles(event)) return;
    depth -= 1;
    overlay.hidden = depth > 0;
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    overlay.hidden = true;
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
}
