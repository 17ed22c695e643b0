//! Every instruction, and what it makes of the image's config.

use serde_json::{Value, json};

use super::case::{Case, case};

const SECOND: u64 = 1_000_000_000;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("cmd and entrypoint as lists", "FROM BASE\nENTRYPOINT [\"/bin/sh\", \"-c\"]\nCMD [\"a b\", \"$HOME\"]\n")
            .config("Entrypoint", json!(["/bin/sh", "-c"]))
            .config("Cmd", json!(["a b", "$HOME"])),
        case("cmd and entrypoint as text", "FROM BASE\nENTRYPOINT exec top  -b\nCMD echo \"a b\"\n")
            .config("Entrypoint", json!(["/bin/sh", "-c", "exec top  -b"]))
            .config("Cmd", json!(["/bin/sh", "-c", "echo \"a b\""])),
        case("the last cmd counts", "FROM BASE\nCMD one\nCMD [\"two\"]\n").config("Cmd", json!(["two"])),
        case("an entrypoint resets the base's cmd", "FROM TRIGGERS\nENTRYPOINT [\"/x\"]\n")
            .with("child", "c\n")
            .config("Entrypoint", json!(["/x"]))
            .config("Cmd", Value::Null),
        case(
            "env in each of its forms",
            "FROM BASE\nENV A=1 B=\"two words\" C=three\\ words D=$A-x\nENV OLD old form  with spaces\n\
             ENV E=${A}0 F=${NONE:-def} G=${A:+alt} H='single $A'\nRUN echo \"$A|$B|$C|$D|$OLD|$E|$F|$G|$H\" > /out\n",
        )
        .file("/out", "1|two words|three words|-x|old form  with spaces|10|def|alt|single $A\n"),
        case("expose", "FROM BASE\nARG P=9\nEXPOSE 80 53/udp $P/tcp\n")
            .config("ExposedPorts", json!({"80/tcp": {}, "53/udp": {}, "9/tcp": {}})),
        case(
            "healthcheck",
            "FROM BASE\nHEALTHCHECK --interval=5s --timeout=2s --start-period=1s --retries=4 CMD [\"/bin/sh\", \"-c\", \"true\"]\n",
        )
        .config(
            "Healthcheck",
            json!({
                "Test": ["CMD", "/bin/sh", "-c", "true"], "Interval": 5 * SECOND, "Timeout": 2 * SECOND,
                "StartPeriod": SECOND, "Retries": 4,
            }),
        ),
        case("no healthcheck", "FROM BASE\nHEALTHCHECK NONE\n").config("Healthcheck", json!({"Test": ["NONE"]})),
        case(
            "labels",
            "FROM BASE\nARG V=3\nLABEL a=1 \"b c\"=\"d e\" v=$V\nLABEL long=\"one \\\ntwo\"\nLABEL a=2\n",
        )
        .config("Labels", json!({"a": "2", "b c": "d e", "v": "3", "long": "one two"})),
        case("onbuild is kept for others", "FROM BASE\nONBUILD RUN echo x > /x\nONBUILD COPY a /b\n")
            .config("OnBuild", json!(["RUN echo x > /x", "COPY a /b"]))
            .absent("/x"),
        case("onbuild is done in a child", "FROM TRIGGERS\nRUN cat /ran > /after\n")
            .with("child", "of the child\n")
            .config("OnBuild", Value::Null)
            .config("Cmd", json!(["/bin/sh", "-c", "inherited"]))
            .file("/triggered", "of the child\n")
            .file("/after", "of the child\n"),
        case(
            "shell",
            "FROM BASE\nSHELL [\"/bin/sh\", \"-e\", \"-c\"]\nRUN echo $- | grep -c e > /out\nCMD x\nENTRYPOINT y\n",
        )
        .buildah_refuses("CMD as text behind a SHELL")
        .config("Shell", json!(["/bin/sh", "-e", "-c"]))
        .config("Cmd", json!(["/bin/sh", "-e", "-c", "x"]))
        .config("Entrypoint", json!(["/bin/sh", "-e", "-c", "y"]))
        .file("/out", "1\n"),
        case("stopsignal", "FROM BASE\nARG S=SIGINT\nSTOPSIGNAL $S\n").config("StopSignal", json!("SIGINT")),
        case(
            "user by name, by number, with a group",
            "FROM BASE\nRUN mkdir -m 777 /o\nUSER ann\nRUN id -u > /o/a; id -g >> /o/a\nUSER 5:daemon\nRUN id -u > /o/b; id -g >> /o/b\n\
             USER 1000:7\n",
        )
        .config("User", json!("1000:7"))
        .file("/o/a", "1000\n1001\n")
        .file("/o/b", "5\n7\n")
        .mode("/o/a", "0644 1000:1001"),
        case("volumes", "FROM BASE\nVOLUME /a /b\nVOLUME [\"/c d\"]\n")
            .config("Volumes", json!({"/a": {}, "/b": {}, "/c d": {}})),
        case(
            "workdir is made, and goes on from the last one",
            "FROM BASE\nENV D=deep\nWORKDIR /a\nWORKDIR b/$D\nRUN pwd > out\nWORKDIR ..\nCOPY f .\n",
        )
        .with("f", "here\n")
        .config("WorkingDir", json!("/a/b"))
        .file("/a/b/deep/out", "/a/b/deep\n")
        .file("/a/b/f", "here\n")
        .folder("/a/b/deep"),
        case("workdir of a user", "FROM BASE\nUSER ann\nWORKDIR /w\nRUN id -u > /tmp/x || true\n")
            .config("WorkingDir", json!("/w"))
            .folder("/w"),
        case(
            "run as a list, and as text",
            "FROM BASE\nRUN [\"/bin/sh\", \"-c\", \"echo list > /list\"]\nRUN echo text > /text && \\\n    echo more >> /text\n",
        )
        .file("/list", "list\n")
        .file("/text", "text\nmore\n"),
        case("maintainer, out of use", "FROM BASE\nMAINTAINER ann <ann@example.com>\nCMD [\"x\"]\n")
            .config("Cmd", json!(["x"])),
        case(
            "args: a default, one that is given, one that is not, and none in the image",
            "FROM BASE\nARG A=default\nARG B=default\nARG C\nRUN echo \"$A|$B|$C|\" > /out\n",
        )
        .arg("B", "given, \"quoted\" = value")
        .file("/out", "default|given, \"quoted\" = value||\n")
        .config("Env", json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])),
        case(
            "an arg of a stage, and of those on top of it",
            "ARG X=global\nFROM BASE AS one\nARG X\nRUN echo \"$X\" > /one\nFROM one\nRUN echo \"[$X]\" > /two\n",
        )
        .file("/one", "global\n")
        .file("/two", "[global]\n")
        .buildah_refuses("the ARG X of a stage"),
        case("an arg is not another stage's", "FROM BASE AS one\nARG X=1\nFROM BASE\nRUN echo \"[$X]\" > /out\n")
            .file("/out", "[]\n"),
        case("env goes before an arg", "FROM BASE\nARG X=arg\nENV X=env\nRUN echo $X > /out\n")
            .arg("X", "given")
            .file("/out", "env\n"),
        case(
            "the platform as args",
            "FROM --platform=$TARGETPLATFORM BASE\nARG TARGETOS\nARG TARGETARCH\nRUN echo $TARGETOS/$TARGETARCH > /out\n",
        )
        .file("/out", "linux/amd64\n"),
    ]
}
