//! `schemas/` is generated from `contract`: it must say what the types say, and the events must be as it says.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../schemas")
}

/// `KILN_BLESS=1` writes them anew (`just schemas`).
#[test]
fn schemas_are_as_generated() -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "how a person asks the test to write the files")]
    let bless = std::env::var_os("KILN_BLESS").is_some();
    let mut expected: Vec<String> = Vec::new();
    for (name, value) in kiln_contract::schema::files() {
        let text = format!("{}\n", serde_json::to_string_pretty(&value)?);
        let path = folder().join(name);
        if bless {
            std::fs::create_dir_all(folder())?;
            std::fs::write(&path, &text)?;
        }
        let committed = std::fs::read_to_string(&path).with_context(|| format!("read schemas/{name}"))?;
        ensure!(
            committed == text,
            "schemas/{name} has drifted from the types: run `just schemas` and commit"
        );
        expected.push(name.into());
    }
    for entry in std::fs::read_dir(folder())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(
            expected.contains(&name),
            "schemas/{name} is not generated: nothing is written there by hand"
        );
    }
    Ok(())
}

/// Fields of an event are only ever added: what a subscriber of today reads must be there tomorrow.
#[test]
fn an_event_has_the_fields_that_the_schemas_require() -> Result<()> {
    let record = kiln_testkit::records::queued("x", [1; 10])?;
    let event = serde_json::to_value(&record)?;
    let (_, schema) = kiln_contract::schema::files().into_iter().next().context("a schema")?;
    let required = schema["required"].as_array().context("required")?;
    ensure!(!required.is_empty());
    for field in required {
        let field = field.as_str().context("a field's name")?;
        ensure!(event.get(field).is_some(), "`{field}` is required, and missing in an event");
        ensure!(schema["properties"].get(field).is_some(), "`{field}` has no schema");
    }
    Ok(())
}
