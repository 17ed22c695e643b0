//! How a Dockerfile may be written.

use serde_json::json;

use super::case::{Case, case};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("an arg before from", "ARG IMAGE=nowhere.invalid/x\nARG TAG\nFROM ${IMAGE}\nRUN echo x > /x\n")
            .arg("IMAGE", "BASE")
            .file("/x", "x\n"),
        case("line ends of another system", "FROM BASE\r\nENV A=1 \\\r\n    B=2\r\nRUN echo $A$B > /out\r\n").file("/out", "12\n"),
        case("a byte order mark", "\u{feff}FROM BASE\nRUN echo x > /x\n").file("/x", "x\n"),
        case("no line end at the end", "FROM BASE\nCMD [\"x\"]").config("Cmd", json!(["x"])),
        case("small letters, and space before", "  from BASE as one\n\trun echo x > /x\nfrom one\n cmd [\"y\"]\n")
            .file("/x", "x\n")
            .config("Cmd", json!(["y"])),
        case(
            "comments and empty lines within a step",
            "# first\nFROM BASE\n# between\n\nRUN echo a > /out && \\\n  # a comment\n\n  echo b >> /out\n#RUN exit 1\n",
        )
        .file("/out", "a\nb\n"),
        case("another escape character", "# escape=`\nFROM BASE\nENV P=C:\\dir\nRUN echo a `\n  b > /out; echo \"$P\" >> /out\n")
            .file("/out", "a b\nC:\\dir\n")
            .buildah_refuses("`# escape=``"),
        case("a syntax line", "# syntax=docker/dockerfile:1\nFROM BASE\nRUN echo x > /x\n").file("/x", "x\n"),
        case("a check line", "# check=skip=all\nFROM BASE AS Base\nRUN echo x > /x\n").file("/x", "x\n"),
        case("a run heredoc", "FROM BASE\nRUN <<EOF\necho one > /out\nX=two\necho $X >> /out\nEOF\nENV AFTER=1\n")
            .file("/out", "one\ntwo\n")
            .buildah_refuses("heredoc in line 2"),
        case(
            "copy heredocs",
            "FROM BASE\nENV W=word\nCOPY <<one.txt <<'two.txt' /d/\n$W\none.txt\n$W\ntwo.txt\nCOPY --chmod=0700 <<-T /script\n\t#!/bin/sh\n\tT\n",
        )
        .file("/d/one.txt", "word\n")
        .file("/d/two.txt", "$W\n")
        .file("/script", "#!/bin/sh\n")
        .mode("/script", "0700 0:0")
        .buildah_refuses("heredoc in line 3"),
        case("what only looks like a heredoc", "FROM BASE\nRUN echo $((1<<3)) '<<EOF' > /out\n").file("/out", "8 <<EOF\n"),
        case(
            "variables in every place that takes them",
            "FROM BASE\nARG A=a\nARG D=/dir\nENV V=$A\nLABEL l=$V\nWORKDIR $D\nCOPY $A.txt ${D}/to-$V\n",
        )
        .with("a.txt", "a\n")
        .config("Labels", json!({"l": "a"}))
        .file("/dir/to-a", "a\n"),
        case("a dollar that is meant", "FROM BASE\nENV A=\\$HOME B='$HOME'\nRUN echo \"$A $B\" > /out\n").file("/out", "$HOME $HOME\n"),
        case("patterns in variables", "FROM BASE\nARG V=v1.2.3\nENV S=${V#v} E=${V%.*}\nRUN echo $S $E > /out\n")
            .file("/out", "1.2.3 v1.2\n")
            .buildah_refuses("${V#v}"),
    ]
}
