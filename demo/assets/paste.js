// Ctrl-V brings an image to the tab that is open, over plain http as well, where browsers keep buttons from the clipboard.
() => {
  const shown = () => ["#upload", "#why-upload", "#compare-upload"]
    .map((id) => document.querySelector(id)).find((block) => block && block.offsetParent !== null);
  const input = async (block) => {
    const clear = block.querySelector("button[aria-label='Remove Image'], button[title='Remove Image']");
    if (clear) clear.click();
    for (let tries = 0; tries < 100; tries += 1) {
      const found = block.querySelector("input[type=file]");
      if (found && !block.querySelector("button[aria-label='Remove Image'], button[title='Remove Image']")) return found;
      await new Promise((done) => setTimeout(done, 20));
    }
    return null;
  };
  document.addEventListener("paste", async (event) => {
    const file = [...(event.clipboardData ? event.clipboardData.files : [])].find((each) => each.type.startsWith("image/"));
    const block = shown();
    if (!file || !block) return;
    event.preventDefault();
    const target = await input(block);
    if (!target) return;
    const files = new DataTransfer();
    files.items.add(file);
    target.files = files.files;
    target.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
