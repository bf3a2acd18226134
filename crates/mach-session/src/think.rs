//! Reasoning blocks, as far as showing them needs: where a reply thinks and where it speaks.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Whether a prompt ends inside a reasoning block, so that the reply starts with thinking.
pub fn prompt_opens_thinking(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

/// Splits a stream of text into thinking and speaking. The tags themselves are left out.
#[derive(Clone, Debug)]
pub struct ThinkSplitter {
    thinking: bool,
    held: String,
}

/// A piece of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Inside a reasoning block.
    pub thinking: bool,
    /// Its text, never empty.
    pub text: String,
}

impl ThinkSplitter {
    /// A splitter at the start of a reply; `thinking` as [`prompt_opens_thinking`] says.
    pub fn new(thinking: bool) -> Self {
        Self { thinking, held: String::new() }
    }

    /// Takes the next text; the beginning of a tag is held back.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        loop {
            let tag = if self.thinking { CLOSE } else { OPEN };
            if let Some(at) = self.held.find(tag) {
                let rest = self.held.split_off(at + tag.len());
                self.held.truncate(at);
                self.take(&mut parts);
                self.held = rest;
                self.thinking = !self.thinking;
                continue;
            }
            let keep = (1..tag.len()).rev().find(|&n| self.held.ends_with(&tag[..n])).unwrap_or(0);
            let rest = self.held.split_off(self.held.len() - keep);
            self.take(&mut parts);
            self.held = rest;
            return parts;
        }
    }

    /// What was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        self.take(&mut parts);
        parts
    }

    fn take(&mut self, parts: &mut Vec<Part>) {
        if !self.held.is_empty() {
            parts.push(Part { thinking: self.thinking, text: std::mem::take(&mut self.held) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However the text is cut, thinking and speaking are the same.
    #[test]
    fn parts_do_not_depend_on_the_cut() {
        let text = "a < b</think>\n\nyes <thin <think>more</think>done</thi";
        for size in 1..text.len() {
            let mut splitter = ThinkSplitter::new(true);
            let (mut thought, mut said) = (String::new(), String::new());
            let mut parts = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                parts.extend(splitter.push(std::str::from_utf8(piece).unwrap()));
            }
            parts.extend(splitter.finish());
            for part in parts {
                if part.thinking { &mut thought } else { &mut said }.push_str(&part.text);
            }
            assert_eq!((thought.as_str(), said.as_str()), ("a < bmore", "\n\nyes <thin done</thi"), "pieces of {size}");
        }
    }

    /// Only an open block at the very end counts, not the word somewhere in the conversation.
    #[test]
    fn prompts_that_open_thinking() {
        assert!(prompt_opens_thinking("<|im_start|>assistant\n<think>\n"));
        assert!(!prompt_opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
        assert!(!prompt_opens_thinking("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n"));
    }
}
