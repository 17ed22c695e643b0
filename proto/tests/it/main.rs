//! The old service's protocol: its clients and its ws-manager know fields by their numbers, and services by their full names.

#![expect(
    clippy::expect_used,
    reason = "clippy takes only the tests themselves for tests, not what they share"
)]

use std::collections::BTreeMap;

use prost_types::{DescriptorProto, FileDescriptorProto};

/// `builder`, as image-builder-mk3 serves it.
const BUILDER: &str = "
    BuildSource: ref=1 file=2
    BuildSourceReference: ref=1
    BuildSourceDockerfile: source=1 dockerfile_version=2 dockerfile_path=3 context_path=4
    ResolveBaseImageRequest: ref=1 auth=2 use_retry_client=3
    ResolveBaseImageResponse: ref=1
    ResolveWorkspaceImageRequest: source=1 auth=2 use_retry_client=3
    ResolveWorkspaceImageResponse: ref=1 status=2 base_ref=3
    BuildRequest: source=1 auth=2 force_rebuild=3 triggered_by=4 supervisor_ref=5 base_image_name_resolved=6 use_retry_client=7
    BuildRegistryAuth: total=1 selective=2 additional=3
    BuildRegistryAuthTotal: allow_all=1
    BuildRegistryAuthSelective: allow_baserep=1 allow_workspacerep=2 any_of=3
    BuildResponse: ref=1 status=2 message=3 base_ref=4 info=5
    BuildStatus: unknown=0 running=1 done_success=2 done_failure=3
    LogsRequest: build_ref=1 censored=2 build_id=3
    LogsResponse: content=1
    ListBuildsRequest:
    ListBuildsResponse: builds=1
    BuildInfo: ref=1 status=2 started_at=3 base_ref=4 build_id=5 log_info=6
    LogInfo: url=1 headers=2
    ImageBuilder: ResolveBaseImage ResolveWorkspaceImage Build(stream) Logs(stream) ListBuilds
";

/// `wsman`, as far as builders need it.
const WSMAN: &str = "
    MetadataFilter: owner=1 meta_id=2 annotations=3
    GetWorkspacesRequest: must_match=1
    GetWorkspacesResponse: status=1
    SubscribeRequest: must_match=1
    SubscribeResponse: status=1 header=3
    StartWorkspaceRequest: id=1 service_prefix=2 metadata=3 spec=4 type=6
    StartWorkspaceResponse: url=1 owner_token=2
    StopWorkspaceRequest: id=1 policy=2
    StopWorkspacePolicy: NORMALLY=0 IMMEDIATELY=1 ABORT=2
    DescribeWorkspaceRequest: id=1
    IDEImage: web_ref=1 supervisor_ref=3
    EnvironmentVariable: name=1 value=2 secret=3
    WorkspacePhase: UNKNOWN=0 PENDING=1 CREATING=2 INITIALIZING=3 RUNNING=4 STOPPING=5 STOPPED=6 INTERRUPTED=7
    WorkspaceConditionBool: FALSE=0 TRUE=1 EMPTY=2
";

/// Fields that are among others that builders don't need.
const WSMAN_AMONG_OTHERS: &str = "
    WorkspaceMetadata: owner=1 meta_id=2 started_at=3 annotations=4
    StartWorkspaceSpec: workspace_image=1 initializer=4 envvars=6 workspace_location=8 timeout=10 ide_image=12
    WorkspaceStatus: id=1 metadata=2 spec=3 phase=4 conditions=5 message=6 auth=9 status_version=10
    WorkspaceSpec: url=4
    WorkspaceConditions: failed=1 timeout=2 headless_task_failed=10 stopped_by_request=11 aborted=13
    WorkspaceAuthentication: owner_token=2
    WorkspaceType: IMAGEBUILD=4
    WorkspaceManager: GetWorkspaces Subscribe(stream) StartWorkspace StopWorkspace DescribeWorkspace
";

/// `contentservice`: an initializer is passed on whole, and a git one read.
const CONTENT: &str = "
    WorkspaceInitializer: empty=1 git=2 snapshot=3 prebuild=4 composite=5 download=6 backup=7
    GitInitializer: remote_uri=1 upstream_Remote_uri=2 target_mode=3 clone_taget=4 checkout_location=5 config=6 full_clone=7
    CloneTargetMode: REMOTE_HEAD=0 REMOTE_COMMIT=1 REMOTE_BRANCH=2 LOCAL_BRANCH=3
    GitConfig: custom_config=1 authentication=2 auth_user=3 auth_password=4 auth_ots=5
    GitAuthMethod: NO_AUTH=0 BASIC_AUTH=1 BASIC_AUTH_OTS=2
";

/// Each message, enumeration and service of a package, by its name: `field=number …`, or its calls.
fn declared(package: &str) -> BTreeMap<String, String> {
    let files = ["builder/imgbuilder.proto", "wsman/core.proto"];
    let all = protox::compile(files, [env!("CARGO_MANIFEST_DIR")]).expect("the protocol compiles");
    let mut declared = BTreeMap::new();
    for file in all.file.iter().filter(|file| file.package() == package) {
        for message in &file.message_type {
            add(message, &mut declared);
        }
        declared.extend(enumerations(file));
        for service in &file.service {
            let calls = service.method.iter().map(|call| match call.server_streaming() {
                true => format!("{}(stream)", call.name()),
                false => call.name().to_owned(),
            });
            declared.insert(service.name().to_owned(), calls.collect::<Vec<_>>().join(" "));
        }
    }
    declared
}

fn add(message: &DescriptorProto, declared: &mut BTreeMap<String, String>) {
    let mut fields: Vec<_> = message.field.iter().map(|field| (field.number(), field.name())).collect();
    fields.sort_unstable();
    let fields = fields.iter().map(|(number, name)| format!("{name}={number}"));
    declared.insert(message.name().to_owned(), fields.collect::<Vec<_>>().join(" "));
    message.nested_type.iter().for_each(|nested| add(nested, declared));
}

fn enumerations(file: &FileDescriptorProto) -> impl Iterator<Item = (String, String)> + '_ {
    file.enum_type.iter().map(|of| {
        let values = of.value.iter().map(|value| format!("{}={}", value.name(), value.number()));
        (of.name().to_owned(), values.collect::<Vec<_>>().join(" "))
    })
}

fn lines(table: &str) -> impl Iterator<Item = (&str, &str)> {
    table
        .trim()
        .lines()
        .map(|line| line.split_once(':').expect("a name"))
        .map(|(name, of)| (name.trim(), of.trim()))
}

#[test]
fn names_and_numbers_are_those_that_its_peers_know() {
    for (package, table) in [("builder", BUILDER), ("wsman", WSMAN), ("contentservice", CONTENT)] {
        let declared = declared(package);
        for (name, expected) in lines(table) {
            assert_eq!(declared.get(name).map(String::as_str), Some(expected), "{package}.{name}");
        }
    }
    let declared = declared("wsman");
    for (name, expected) in lines(WSMAN_AMONG_OTHERS) {
        let all: Vec<&str> = declared[name].split(' ').collect();
        for field in expected.split(' ') {
            assert!(all.contains(&field), "wsman.{name}: no {field} among {all:?}");
        }
    }
}
