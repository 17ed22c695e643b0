//! Findings for people, and for programs.

use std::io::{self, Write as _};

use kiln_domain::finding::{Finding, Verdict};
use serde::Serialize;

use crate::cli::output::{Format, printable};

/// A line of `--output json`, told by `type`.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Finding(&'a Finding),
    Summary {
        /// The worst.
        verdict: Verdict,
        ok: usize,
        unchecked: usize,
        warnings: usize,
        problems: usize,
    },
}

/// Writes them to standard output.
pub(super) fn write(findings: &[Finding], format: Format) -> io::Result<()> {
    let text = match format {
        Format::Json => json(findings)?,
        Format::Text => text(findings),
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The worst of the verdicts.
pub(super) fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

fn count(findings: &[Finding], verdict: Verdict) -> usize {
    findings.iter().filter(|finding| finding.verdict == verdict).count()
}

fn json(findings: &[Finding]) -> io::Result<String> {
    let summary = Line::Summary {
        verdict: worst(findings),
        ok: count(findings, Verdict::Ok),
        unchecked: count(findings, Verdict::Unchecked),
        warnings: count(findings, Verdict::Warning),
        problems: count(findings, Verdict::Problem),
    };
    let mut lines = String::new();
    for line in findings.iter().map(Line::Finding).chain([summary]) {
        lines.push_str(&serde_json::to_string(&line)?);
        lines.push('\n');
    }
    Ok(lines)
}

fn text(findings: &[Finding]) -> String {
    let widest = findings.iter().map(|finding| finding.part.chars().count()).max().unwrap_or_default();
    let mut lines = String::new();
    for Finding { part, verdict, says, remedy } in findings {
        let (part, says) = (printable(part), printable(says));
        lines.push_str(&format!("{:<11}  {part:<widest$}  {says}\n", verdict.as_str()));
        if let Some(remedy) = remedy {
            lines.push_str(&format!("{:<11}  {:<widest$}  → {}\n", "", "", printable(remedy)));
        }
    }
    let many =
        |number: usize, one: &str| if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") };
    lines.push_str(&format!(
        "\n{}, {}, {} not checked, {} ok\n",
        many(count(findings, Verdict::Problem), "problem"),
        many(count(findings, Verdict::Warning), "warning"),
        count(findings, Verdict::Unchecked),
        count(findings, Verdict::Ok),
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_lines() {
        let findings = [
            Finding::ok("git", "git version 2"),
            Finding::problem("stream X", "it is \x1b[2J not there", "start a role"),
        ];
        assert_eq!(
            text(&findings),
            "\
ok           git       git version 2
problem      stream X  it is \\u{1b}[2J not there
                       → start a role

1 problem, 0 warnings, 0 not checked, 1 ok
"
        );
        assert_eq!(
            json(&findings).unwrap().lines().collect::<Vec<_>>(),
            [
                r#"{"type":"finding","part":"git","verdict":"ok","says":"git version 2"}"#,
                r#"{"type":"finding","part":"stream X","verdict":"problem","says":"it is \u001b[2J not there","remedy":"start a role"}"#,
                r#"{"type":"summary","verdict":"problem","ok":1,"unchecked":0,"warnings":0,"problems":1}"#,
            ]
        );
    }
}
