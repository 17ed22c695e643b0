//! Each role as a process of its own, two of some, on a NATS that runs already.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use kiln_testkit::fleet::free_addresses;
use kiln_testkit::nats::run_server;
use rustix::process::Signal;

use crate::running::{answers, eventually, get, kiln, signal};

/// A role's process. Killed on drop.
struct Role {
    child: Child,
    health: SocketAddr,
    metrics: SocketAddr,
    grpc: SocketAddr,
}

impl Role {
    fn start(role: &str, common: &BTreeMap<&str, String>) -> Self {
        let [health, metrics, grpc] = free_addresses().expect("ports");
        let child = kiln()
            .arg(role)
            .envs(common)
            .env("KILN_LOG", "warn")
            .env("KILN_LISTEN__HEALTH", health.to_string())
            .env("KILN_LISTEN__METRICS", metrics.to_string())
            .env("KILN_LISTEN__GRPC", grpc.to_string())
            .stdout(Stdio::null())
            .spawn()
            .expect("started");
        Self { child, health, metrics, grpc }
    }

    fn is_ready(&self) -> bool {
        answers(self.health) && get(self.health, "/ready").starts_with("HTTP/1.1 200")
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Either fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn every_role_runs_alone_and_ends_when_asked() {
    let mut nats = run_server().await.expect("NATS");
    let folder = tempfile::tempdir().expect("a folder");
    let seed = kiln_bus::seal::OpenKey::new_seed().expect("a seed");
    let seed_file = folder.path().join("seal.key");
    std::fs::write(&seed_file, secrecy::ExposeSecret::expose_secret(&seed)).expect("written");
    let common = BTreeMap::from([
        ("KILN_NATS__URL", nats.url()),
        // A server of its own reserves only so much of the disk as is free.
        ("KILN_STREAMS__JOURNAL_MAX_BYTES", (256 << 20).to_string()),
        ("KILN_STREAMS__LOGS_MAX_BYTES", (256 << 20).to_string()),
        ("KILN_SEAL__SEED_FILE", seed_file.display().to_string()),
        ("KILN_ENGINE__LOCAL__FOLDER", folder.path().join("engine").display().to_string()),
        ("KILN_ORCHESTRATOR__BASE_IMAGE_REPOSITORY", "127.0.0.1:1/base".to_owned()),
        ("KILN_ORCHESTRATOR__WORKSPACE_IMAGE_REPOSITORY", "127.0.0.1:1/workspace".to_owned()),
    ]);
    let names = [
        "gateway",
        "gateway",
        "resolver",
        "orchestrator",
        "orchestrator",
        "log-relay",
        "log-relay",
        "cache-warmer",
    ];
    let mut roles: Vec<Role> = names.iter().map(|name| Role::start(name, &common)).collect();
    for (name, role) in names.iter().zip(&roles) {
        eventually(&format!("{name}: ready"), || role.is_ready().then_some(()));
        assert!(get(role.metrics, "/metrics").contains("kiln_build_info"), "{name}");
    }
    assert!(answers(roles[0].grpc) && answers(roles[1].grpc));

    nats.kill();
    for (name, role) in names.iter().zip(&roles) {
        eventually(&format!("{name}: no longer ready"), || {
            get(role.health, "/ready").contains("not connected to the bus").then_some(())
        });
        assert!(get(role.health, "/live").starts_with("HTTP/1.1 200"), "{name}");
    }
    nats.start_again().await.expect("NATS again");
    for (name, role) in names.iter().zip(&roles) {
        eventually(&format!("{name}: ready again"), || role.is_ready().then_some(()));
    }

    // Each looks after the streams: whoever sees it first makes it again.
    nats.delete_stream("KILN_LOGS").await.expect("deleted");
    eventually("a role says that a stream was missing", || {
        let line = "kiln_bus_troubles_total{part=\"KILN_LOGS\",what=\"missing\"} 1";
        roles.iter().any(|role| get(role.metrics, "/metrics").contains(line)).then_some(())
    });
    eventually("a role says that the stream is there again", || {
        let line = "kiln_bus_trouble{part=\"KILN_LOGS\",what=\"missing\"} 0";
        roles.iter().any(|role| get(role.metrics, "/metrics").contains(line)).then_some(())
    });
    nats.delete_stream("KILN_LOGS").await.expect("it is there again");

    // What a role meets is told by its process.
    nats.purge_stream("KV_KILN_HOLDERS").await.expect("emptied");
    eventually("each holder says that the leases were emptied", || {
        let line = "kiln_bus_troubles_total{part=\"KV_KILN_HOLDERS\",what=\"emptied\"} 1";
        let holders =
            names.iter().zip(&roles).filter(|(name, _)| ["orchestrator", "log-relay"].contains(name));
        holders.into_iter().all(|(_, role)| get(role.metrics, "/metrics").contains(line)).then_some(())
    });

    // Half of them while the bus is there, half of them when it is away: nobody waits for it at the end.
    for (at, (name, role)) in names.iter().zip(&mut roles).enumerate() {
        if at == names.len() / 2 {
            nats.kill();
        }
        signal(role.child.id(), Signal::TERM);
        let status = eventually(&format!("{name}: its end"), || role.child.try_wait().expect("waited for"));
        assert_eq!(status.code(), Some(0), "{name}");
    }
}
