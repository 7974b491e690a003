//! Bodies in the forms of known servers' chat interfaces, written by hand after the documentation: what vLLM, llama.cpp's `llama-server` and Ollama say
//! of themselves in their pages and sources of 2025. None was recorded from a running server.

use serde_json::{Value, json};

/// A body, with the server whose form it has.
pub(crate) type Body = (&'static str, Value);

/// Answers that say `text`, with what they say of tokens: 100 and 20, or nothing.
pub(crate) fn answers(text: &str) -> Vec<(Body, [u64; 2])> {
    let counted = [100, 20];
    vec![
        (("vLLM", vllm(Some(text), None, "stop")), counted),
        (
            (
                "vLLM with a model that thinks",
                vllm(Some(text), Some("A box [0, 0]? No."), "stop"),
            ),
            counted,
        ),
        (
            ("llama.cpp", llama_cpp(text, "Let me look.", "stop")),
            counted,
        ),
        (("Ollama", ollama(text, "Okay.", "stop")), counted),
        // Some that pass the answers of others on write every key that there may be, or leave the bill out.
        (
            (
                "a service with empty keys",
                json!({
                    "id": "chatcmpl-4", "object": "chat.completion", "created": 1_760_000_000, "model": "qwen-vl",
                    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": null, "message": {
                        "role": "assistant", "content": text, "refusal": null, "function_call": null, "tool_calls": null,
                    }}],
                    "service_tier": null, "system_fingerprint": null, "usage": null,
                }),
            ),
            [0, 0],
        ),
        (
            (
                "a service without a bill",
                json!({
                    "object": "chat.completion", "model": "qwen-vl",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                }),
            ),
            [0, 0],
        ),
    ]
}

/// Answers of models that thought until no tokens were left, and one of a model that has not said a word.
pub(crate) fn thoughts() -> Vec<Body> {
    let thought = "The apple is at the left, so {\"regions\": [] would not";
    vec![
        ("vLLM", vllm(None, Some(thought), "length")),
        ("llama.cpp", llama_cpp("", thought, "length")),
        ("Ollama", ollama("", thought, "length")),
        (
            "Ollama at a loss",
            json!({
                "id": "chatcmpl-202", "object": "chat.completion", "created": 0, "model": "", "system_fingerprint": "fp_ollama",
                "choices": [{"index": 0, "message": {"role": "", "content": ""}, "finish_reason": null}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            }),
        ),
    ]
}

/// What is said of a request that cannot be answered, with status 400.
pub(crate) fn complaints(message: &str) -> Vec<Body> {
    vec![
        (
            "vLLM",
            json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": 400}}),
        ),
        (
            "older vLLM",
            json!({"object": "error", "message": message, "type": "BadRequestError", "param": null, "code": 400}),
        ),
        (
            "llama.cpp",
            json!({"error": {"code": 400, "message": message, "type": "invalid_request_error"}}),
        ),
        (
            "Ollama",
            json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": null}}),
        ),
        ("Ollama's own interface", json!({"error": message})),
    ]
}

/// What llama.cpp says with status 503 until it has read its model.
pub(crate) fn still_loading() -> Value {
    json!({"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
}

/// What Ollama says with status 404 of a model that it does not have.
pub(crate) fn no_such_model() -> Value {
    json!({"error": {"message": "model \"qwen-vl\" not found, try pulling it first", "type": "not_found_error", "param": null, "code": null}})
}

fn vllm(content: Option<&str>, reasoning: Option<&str>, finish_reason: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_760_000_000, "model": "qwen-vl",
        "choices": [{
            "index": 0, "logprobs": null, "finish_reason": finish_reason, "stop_reason": null, "token_ids": null,
            "message": {
                "role": "assistant", "content": content, "refusal": null, "annotations": null, "audio": null, "function_call": null,
                "tool_calls": [], "reasoning": reasoning, "reasoning_content": reasoning,
            },
        }],
        "service_tier": null, "system_fingerprint": null,
        "usage": {"prompt_tokens": 100, "total_tokens": 120, "completion_tokens": 20, "prompt_tokens_details": null},
        "prompt_logprobs": null, "prompt_token_ids": null, "kv_transfer_params": null,
    })
}

fn llama_cpp(content: &str, reasoning: &str, finish_reason: &str) -> Value {
    json!({
        "choices": [{
            "finish_reason": finish_reason, "index": 0,
            "message": {"role": "assistant", "content": content, "reasoning_content": reasoning},
        }],
        "created": 1_760_000_000, "id": "chatcmpl-2", "model": "qwen-vl", "object": "chat.completion", "system_fingerprint": "b6000-0123abc",
        "usage": {"completion_tokens": 20, "prompt_tokens": 100, "total_tokens": 120, "prompt_tokens_details": {"cached_tokens": 0}},
        "timings": {
            "cache_n": 0, "prompt_n": 100, "prompt_ms": 30.9, "prompt_per_token_ms": 0.309, "prompt_per_second": 3236.2,
            "predicted_n": 20, "predicted_ms": 661.0, "predicted_per_token_ms": 33.05, "predicted_per_second": 30.3,
        },
    })
}

fn ollama(content: &str, reasoning: &str, finish_reason: &str) -> Value {
    json!({
        "id": "chatcmpl-3", "object": "chat.completion", "created": 1_760_000_000, "model": "qwen-vl", "system_fingerprint": "fp_ollama",
        "choices": [{
            "index": 0, "finish_reason": finish_reason,
            "message": {"role": "assistant", "content": content, "reasoning": reasoning},
        }],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    })
}
