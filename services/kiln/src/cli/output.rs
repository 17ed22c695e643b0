//! Standard output and standard error: bytes as they are, texts made safe, and one JSON object a line.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use tokio::io::{AsyncWriteExt as _, Stdout};

use super::failure::Failure;

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Tables and plain lines; a log as its bytes
    Text,
    /// One JSON object a line
    Json,
}

/// `--output`, which every command takes.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct OutputArgs {
    /// How the answer is written
    #[arg(long = "output", short = 'o', value_name = "FORMAT", value_enum, default_value = "text")]
    pub(super) format: Format,
}

/// Standard output. Writing may wait for a slow reader without keeping Ctrl-C from being heard.
#[derive(Debug)]
pub(super) struct Output {
    stdout: Stdout,
    format: Format,
}

impl Output {
    pub(super) fn new(args: &OutputArgs) -> Self {
        Self { stdout: tokio::io::stdout(), format: args.format }
    }

    /// For an answer that has only one form.
    pub(super) fn text() -> Self {
        Self { stdout: tokio::io::stdout(), format: Format::Text }
    }

    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Bytes as they are, out of our hands when this returns. [`Failure::OutputClosed`] when nobody reads.
    pub(super) async fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = async {
            self.stdout.write_all(bytes).await?;
            self.stdout.flush().await
        };
        written.await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Output(error),
        })
    }

    /// One line. Texts from a server must have gone through [`printable`].
    pub(super) async fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.bytes(format!("{text}\n").as_bytes()).await
    }

    /// One JSON object on a line of its own.
    pub(super) async fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value).map_err(|error| Failure::Output(error.into()))?;
        line.push(b'\n');
        self.bytes(&line).await
    }
}

/// A line to the user on standard error, as `kiln: …`. It is no failure if nobody reads it.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "kiln: {text}");
}

/// Text on standard error as it is.
pub(super) fn say_raw(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// A table without borders, one line a row whatever the terminal's width, so that `grep` and `awk` may read it.
pub(super) fn table<const N: usize>(
    header: Option<[&str; N]>,
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if let Some(header) = header {
        table.set_header(header);
    }
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(cell).into_owned()));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// `text` with every control character, and what turns the direction of writing, as an escape: a server's text must not
/// drive the terminal.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let drives = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(drives) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => safe.push_str("\\n"),
            '\t' => safe.push_str("\\t"),
            '\r' => safe.push_str("\\r"),
            c if drives(c) => {
                let _ = write!(safe, "\\u{{{:x}}}", u32::from(c));
            }
            c => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_escaped() {
        for (text, safe) in [
            ("plain größe 日本", "plain größe 日本"),
            ("\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
            ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
            ("\u{9b}31m\u{202e}x", "\\u{9b}31m\\u{202e}x"),
        ] {
            assert_eq!(printable(text), safe);
        }
    }

    #[test]
    fn a_table_is_one_line_a_row() {
        let text = table(Some(["ID", "REF"]), [["a".into(), "x\ny".into()], ["bb".into(), "z".repeat(200)]]);
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            ["ID  REF", "a   x\\ny", &format!("bb  {}", "z".repeat(200))]
        );
    }
}
