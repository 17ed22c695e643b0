//! `builder builder --run-dir DIR`: the builder by itself, for the tests of engines (`kiln builder`,
//! `kiln keep-buildkitd` and `kiln export-layers` are the same).

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(role), Some(flag), Some(run)) if role == "builder" && flag == "--run-dir" => {
            kiln_builder::run(&PathBuf::from(run)).into()
        }
        (Some(role), Some(flag), Some(folder)) if role == "keep-buildkitd" && flag == "--folder" => {
            kiln_builder::keep_buildkitd(&PathBuf::from(folder), arguments.next().is_some())
        }
        (Some(role), Some(flag), Some(folder)) if role == "export-layers" && flag == "--folder" => {
            kiln_builder::export_layers(&PathBuf::from(folder), arguments.next().is_some())
        }
        _ => ExitCode::from(2),
    }
}
