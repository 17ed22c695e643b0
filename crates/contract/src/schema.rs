//! The bus's public page: JSON Schemas of what others may read, and an AsyncAPI 3 document, generated from the types.

use kiln_domain::record::Record;
use kiln_domain::transition::EVENTS;
use serde_json::{Value, json};

use crate::event::{self, Progress};
use crate::subject;

/// Every generated file: its name in `schemas/`, and its content.
pub fn files() -> Vec<(&'static str, Value)> {
    vec![
        (
            "build-event.json",
            schema::<Record>("The data of every event of a build: its whole record after the event"),
        ),
        ("progress.json", schema::<Progress>("The step that a build runs now")),
        ("asyncapi.json", asyncapi()),
    ]
}

fn schema<T: schemars::JsonSchema>(description: &str) -> Value {
    let mut schema = schemars::schema_for!(T);
    schema.insert("description".into(), json!(description));
    schema.to_value()
}

fn asyncapi() -> Value {
    let mut messages: serde_json::Map<String, Value> = EVENTS
        .into_iter()
        .map(|name| {
            let message = json!({
                "name": event::cloudevents_type(name),
                "title": name,
                "contentType": event::CONTENT_TYPE,
                "headers": {
                    "type": "object",
                    "description": "CloudEvents 1.0, NATS protocol binding, binary mode",
                    "required": ["ce-specversion", "ce-id", "ce-type", "ce-source", "ce-subject", "ce-time"],
                    "properties": {
                        "ce-specversion": {"const": "1.0"},
                        "ce-id": {"type": "string", "description": "also the Nats-Msg-Id"},
                        "ce-type": {"const": event::cloudevents_type(name)},
                        "ce-source": {"type": "string", "description": "/kiln/<instance>"},
                        "ce-subject": {"type": "string", "description": "the build's id"},
                        "ce-time": {"type": "string", "format": "date-time",
                            "description": "when it was sent; the stream's own time of the message is what counts"},
                        "traceparent": {"type": "string", "description": "W3C trace context of the request"}
                    }
                },
                "payload": {"$ref": "build-event.json"}
            });
            (name.to_owned(), message)
        })
        .collect();
    messages.insert(
        "progress".into(),
        json!({"contentType": event::CONTENT_TYPE, "payload": {"$ref": "progress.json"}}),
    );
    let references: serde_json::Map<String, Value> = EVENTS
        .into_iter()
        .map(|name| (name.to_owned(), json!({"$ref": format!("#/components/messages/{name}")})))
        .collect();
    let by_reference: Vec<Value> = EVENTS
        .into_iter()
        .map(|name| json!({"$ref": format!("#/channels/builds/messages/{name}")}))
        .collect();
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Kiln's events",
            "version": "1.0.0",
            "description": format!(
                "Durable events of every build, in the JetStream stream {} (a mirror of {}). The last event of a build is its state.",
                subject::EVENTS_STREAM, subject::JOURNAL_STREAM
            )
        },
        "channels": {
            "builds": {
                "address": "kiln.build.v1.{imageKey}.{buildId}.{event}",
                "description": "Read from the stream, never published to by others.",
                "parameters": {
                    "imageKey": {"description": "the first 32 hex digits of sha256 of the target reference"},
                    "buildId": {"description": "the build's id"},
                    "event": {"enum": EVENTS}
                },
                "messages": references
            },
            "progress": {
                "address": "kiln.progress.v1.{buildId}",
                "description": format!("The running step, in the memory stream {}; at most two a second, and no history.", subject::PROGRESS_STREAM),
                "parameters": {"buildId": {"description": "the build's id"}},
                "messages": {"progress": {"$ref": "#/components/messages/progress"}}
            }
        },
        "operations": {
            "followBuilds": {
                "action": "receive",
                "channel": {"$ref": "#/channels/builds"},
                "messages": by_reference
            },
            "followProgress": {
                "action": "receive",
                "channel": {"$ref": "#/channels/progress"},
                "messages": [{"$ref": "#/channels/progress/messages/progress"}]
            }
        },
        "components": {"messages": messages}
    })
}
