//! COPY, ADD, stages and mounts: which files an image has, whose they are and how they may be used.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::case::{Case, case};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("nothing but files", "FROM scratch\nCOPY a /b\nCOPY d/ /e/\n")
            .with("a", "A\n")
            .with("d/x", "X\n")
            .with("d/sub/y", "Y\n")
            .file("/b", "A\n")
            .file("/e/x", "X\n")
            .file("/e/sub/y", "Y\n"),
        case("copy to a file, a folder, several, by pattern", "FROM scratch\nCOPY a.txt /x\nCOPY a.txt b.txt /d/\nCOPY *.md m? /p/\n")
            .with("a.txt", "a")
            .with("b.txt", "b")
            .with("one.md", "1")
            .with("two.md", "2")
            .with("m1", "m")
            .file("/x", "a")
            .file("/d/a.txt", "a")
            .file("/d/b.txt", "b")
            .file("/p/one.md", "1")
            .file("/p/two.md", "2")
            .file("/p/m1", "m"),
        case(
            "names with spaces and other letters",
            "FROM scratch\nCOPY [\"a file\", \"/to here/\"]\nCOPY größe.txt /\nCOPY d /d\n",
        )
        .with("a file", "spaces\n")
        .with("größe.txt", "ü\n")
                .with("d/x (1).txt", "brackets\n")
        .file("/to here/a file", "spaces\n")
        .file("/größe.txt", "ü\n")
        .file("/d/x (1).txt", "brackets\n"),
        case("owners", "FROM BASE\nCOPY --chown=7:8 f /a\nCOPY --chown=ann:daemon f /b\nCOPY f /c\nUSER ann\nCOPY f /d\n")
            .with("f", "")
            .mode("/a", "0644 7:8")
            .mode("/b", "0644 1000:7")
            .mode("/c", "0644 0:0")
            .mode("/d", "0644 0:0"),
        case("modes", "FROM scratch\nCOPY x /kept\nCOPY --chmod=0640 x /given\nCOPY d /d\n")
            .prepared(modes)
            .mode("/kept", "0755 0:0")
            .mode("/given", "0640 0:0")
            .mode("/d/plain", "0644 0:0")
            .mode("/d/run", "0755 0:0"),
        case("symlinks", "FROM scratch\nCOPY d /d\nCOPY to-file /copied\n")
            .prepared(links)
            .link("/d/to-file", "file")
            .link("/d/to-folder", "sub")
            .link("/d/to-nothing", "no/such")
            .link("/d/out", "/etc/hostname")
            .file("/d/file", "linked\n")
            .file("/copied", "linked\n"),
        case("a symlink of the base on the way", "FROM BASE\nRUN mkdir /real && ln -s /real /link\nCOPY f /link/f\n")
            .with("f", "f\n")
            .file("/real/f", "f\n")
            .link("/link", "/real"),
        case("add unpacks an archive", "FROM scratch\nADD a.tar /un/\nADD a.tar.gz /gz/\nCOPY a.tar /as-it-is\n")
            .prepared(archives)
            .file("/un/in/file", "packed\n")
            .file("/gz/in/file", "packed\n")
            .absent("/un/a.tar"),
        case("dockerignore", "FROM scratch\nCOPY . /c\n")
            .with(".dockerignore", "# a comment\n*.log\n!keep.log\n**/*.tmp\nskip\n/root-only\ndir/*\n!dir/but\n")
            .with("a.log", "")
            .with("keep.log", "k")
            .with("deep/b.log", "d")
            .with("deep/c.tmp", "")
            .with("skip/x", "")
            .with("deep/skip/x", "d")
            .with("root-only", "")
            .with("dir/no", "")
            .with("dir/but", "b")
            .absent("/c/a.log")
            .file("/c/keep.log", "k")
            .file("/c/deep/b.log", "d")
            .absent("/c/deep/c.tmp")
            .absent("/c/skip")
            .file("/c/deep/skip/x", "d")
            .absent("/c/root-only")
            .absent("/c/dir/no")
            .file("/c/dir/but", "b"),
        case("a dockerignore of the Dockerfile's own", "FROM scratch\nCOPY . /c\n")
            .with("Dockerfile.dockerignore", "of-both\nDockerfile*\n")
            .with(".dockerignore", "other\n")
            .with("of-both", "")
            .with("other", "o")
            .absent("/c/of-both")
            .file("/c/other", "o"),
        case(
            "copy from a stage by name, by number, and from an image",
            "FROM BASE AS one\nRUN echo 1 > /1\nFROM BASE\nRUN echo 2 > /2\nFROM scratch\nCOPY --from=one /1 /a\nCOPY --from=1 /2 /b\n\
             COPY --from=BASE /etc/old/ /c/\n",
        )
        .file("/a", "1\n")
        .file("/b", "2\n")
        .file("/c/file", "old\n")
        .absent("/bin"),
        case(
            "a target stage, and nothing of those after it",
            "FROM BASE AS one\nRUN echo 1 > /1\nFROM one AS two\nRUN echo 2 > /2\nFROM two AS three\nRUN exit 9\n",
        )
        .target("two")
        .file("/2", "2\n")
        .file("/1", "1\n"),
        case("a stage that nobody needs is not built", "FROM BASE AS no\nRUN exit 9\nFROM BASE\nRUN echo y > /y\n")
            .file("/y", "y\n"),
        case("a hundred stages", stages(100)).file("/last", "99\n").file("/0", "0\n"),
        case(
            "what is removed, and what takes another's place",
            "FROM BASE\nRUN mkdir /dir && echo x > /dir/x && echo f > /file\nRUN rm /dir/x /etc/old/file && rm -r /file && mkdir /file\n\
             RUN rm -r /etc/old && echo now > /etc/old\n",
        )
        .absent("/dir/x")
        .folder("/dir")
        .folder("/file")
        .file("/etc/old", "now\n"),
        case(
            "special modes and links of one file",
            "FROM BASE\nRUN echo x > /s && chmod 4755 /s && mkdir -m 1777 /sticky && echo l > /l1 && ln /l1 /l2 && ln -s l1 /l3\n",
        )
        .mode("/s", "4755 0:0")
        .mode("/sticky", "1777 0:0")
        .file("/l2", "l\n")
        .link("/l3", "l1"),
        case(
            "a bind mount, of the context and of a stage",
            "FROM BASE AS one\nRUN echo one > /one\nFROM BASE\nRUN --mount=type=bind,source=f,target=/m/f \
             --mount=type=bind,from=one,source=/one,target=/m/one cat /m/f /m/one > /out\n",
        )
        .with("f", "of the context\n")
        .file("/out", "of the context\none\n")
        .buildah_leaves("/m"),
        case(
            "a cache mount is no part of the image",
            "FROM BASE\nRUN --mount=type=cache,target=/cache echo kept > /cache/k\nRUN --mount=type=cache,target=/cache cat /cache/k > /out\n",
        )
        .file("/out", "kept\n")
        .absent("/cache/k"),
        case(
            "a secret is seen by its step alone",
            "FROM BASE\nRUN --mount=type=secret,id=token wc -c < /run/secrets/token > /out\nRUN test ! -e /run/secrets/token\n",
        )
        .secret("token", "twelve bytes")
        .file("/out", "12\n")
        .absent("/run/secrets/token"),
        case("a tmpfs mount", "FROM BASE\nRUN --mount=type=tmpfs,target=/t echo x > /t/x && ls /t > /out\n")
            .file("/out", "x\n")
            .absent("/t/x"),
        case("linked copies", "FROM BASE\nCOPY --link f /l/f\n").with("f", "f\n").file("/l/f", "f\n").buildah_refuses("--link"),
        case("copies without what is excluded", "FROM scratch\nCOPY --exclude=*.tmp d /d\n")
            .with("d/a", "a")
            .with("d/b.tmp", "b")
            .file("/d/a", "a")
            .absent("/d/b.tmp")
            .buildah_refuses("--exclude"),
        case("copies with their parents", "FROM scratch\nCOPY --parents a/b/c x/y /d/\n")
            .with("a/b/c", "c")
            .with("x/y", "y")
            .file("/d/a/b/c", "c")
            .file("/d/x/y", "y")
            .buildah_refuses("--parents"),
    ]
}

/// So many stages, each on top of the last, with a file from the first in the last.
fn stages(count: usize) -> String {
    let mut text = "FROM BASE AS s0\nRUN echo 0 > /0\n".to_owned();
    for stage in 1..count {
        text.push_str(&format!("FROM s{} AS s{stage}\nENV N={stage}\n", stage - 1));
    }
    text + "RUN echo $N > /last\n"
}

fn modes(context: &Path) -> Result<()> {
    std::fs::create_dir(context.join("d"))?;
    for (name, mode) in [("x", 0o755), ("d/plain", 0o644), ("d/run", 0o755)] {
        std::fs::write(context.join(name), name)?;
        std::fs::set_permissions(context.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn links(context: &Path) -> Result<()> {
    std::fs::create_dir_all(context.join("d/sub"))?;
    std::fs::write(context.join("d/file"), "linked\n")?;
    std::fs::write(context.join("d/sub/x"), "x")?;
    symlink("file", context.join("d/to-file"))?;
    symlink("sub", context.join("d/to-folder"))?;
    symlink("no/such", context.join("d/to-nothing"))?;
    symlink("/etc/hostname", context.join("d/out"))?;
    Ok(symlink("d/file", context.join("to-file"))?)
}

fn archives(context: &Path) -> Result<()> {
    std::fs::create_dir(context.join("in"))?;
    std::fs::write(context.join("in/file"), "packed\n")?;
    for (flags, name) in [("-cf", "a.tar"), ("-czf", "a.tar.gz")] {
        let made = Command::new("tar")
            .current_dir(context)
            .args([flags, name, "--mtime=@0", "--owner=0", "--group=0", "in"])
            .status()?;
        ensure!(made.success(), "tar");
    }
    Ok(())
}
