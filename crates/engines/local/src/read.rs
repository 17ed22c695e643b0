//! Reading a run's output: a cursor is the byte's position, in decimal digits; empty is the beginning.

use std::time::Duration;

use kiln_domain::engine::{Cursor, EngineError, Output};
use tokio::time::{Instant, sleep};

use crate::blocking;
use crate::folder::Folder;

/// How soon it is looked for more.
const LOOK: Duration = Duration::from_millis(15);
/// How long a reader waits for more.
const WAIT: Duration = Duration::from_secs(2);

/// At most `max` bytes from the cursor on; waits for some.
pub(crate) async fn read(folder: Folder, from: &Cursor, max: usize) -> Result<Output, EngineError> {
    // What is no cursor of this engine is no place in this output.
    let at = position(from).ok_or(EngineError::Gone)?;
    let since = Instant::now();
    loop {
        let piece = blocking(&folder, move |folder| folder.read(at, max)).await?.ok_or(EngineError::Gone)?;
        if !piece.bytes.is_empty() || piece.end || since.elapsed() >= WAIT {
            return Ok(Output {
                bytes: piece.bytes.into(),
                from: Cursor::new(at.to_string()),
                end: piece.end,
            });
        }
        sleep(LOOK).await;
    }
}

pub(crate) fn advance(from: &Cursor, bytes: &[u8]) -> Cursor {
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    match position(from) {
        Some(at) => Cursor::new(at.saturating_add(length).to_string()),
        None => from.clone(),
    }
}

fn position(cursor: &Cursor) -> Option<u64> {
    if cursor.as_str().is_empty() { Some(0) } else { cursor.as_str().parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_count_bytes() {
        assert_eq!(advance(&Cursor::default(), b"abc"), Cursor::new("3"));
        assert_eq!(advance(&Cursor::new("3"), "é".as_bytes()), Cursor::new("5"));
        assert_eq!(position(&Cursor::new("x")), None);
    }
}
