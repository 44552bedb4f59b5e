// Names for buttons of gradio that have only a picture: a screen reader would call them "button".
() => {
  const text = (element) => (element ? element.textContent.trim() : "");
  const name = () => {
    document.querySelectorAll("button:not([aria-label])").forEach((button) => {
      if (text(button) || button.title) return;
      const block = button.closest(".block");
      const items = [...button.parentElement.querySelectorAll(":scope > button")];
      if (button.classList.contains("gallery-item")) {
        button.setAttribute("aria-label", "Example " + (items.indexOf(button) + 1));
      } else if (button.querySelector("img")) {
        const image = button.querySelector("img");
        const label = block && block.querySelector("label");
        button.setAttribute("aria-label", image.alt || text(label) || "Image");
      }
    });
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
