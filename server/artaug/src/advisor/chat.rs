//! The understanding model behind an OpenAI-compatible chat endpoint with image input (vLLM, llama.cpp, Ollama, hosted ones).

#[cfg(test)]
mod tests;

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{
    Advice, Advisor, AdvisorError, BoxConvention, Question, RejectedReply, TEMPLATE_VERSION, Usage,
    parse_reply, reply_schema, system_text, user_text,
};
use crate::{
    endpoint::Endpoint,
    image::{Image, MAX_SIDE},
};

/// Path of the chat interface below an endpoint's base URL.
const CHAT_PATH: &str = "chat/completions";

/// What a chat model is asked with, whatever the question.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatSettings {
    /// Name of the model at the endpoint.
    pub model: String,
    /// Tries to get a usable answer on one image; each asks with another seed.
    pub tries: u32,
    /// Sampling temperature.
    pub temperature: f64,
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// Whether to send the JSON schema along. Endpoints that do not know it refuse the call.
    pub send_schema: bool,
    /// Images are enlarged by a whole factor until their shorter side has this many pixels.
    pub least_side: u32,
}

impl ChatSettings {
    /// The usual settings for a model.
    pub fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            tries: 3,
            temperature: 0.2,
            max_tokens: 800,
            send_schema: true,
            least_side: 448,
        }
    }
}

/// One question to a chat model.
#[derive(Debug, Clone, Copy)]
pub struct ChatQuestion<'a> {
    /// The part that is the same for every image.
    pub system: &'a str,
    /// The part for this image.
    pub user: &'a str,
    /// The image as sent.
    pub image: &'a Image,
    /// Name and schema of the answer.
    pub schema: (&'a str, &'a Value),
    /// Seed of the answer, where the endpoint has seeds.
    pub seed: u64,
}

/// A chat model at an endpoint.
#[derive(Debug, Clone)]
pub struct Chat {
    endpoint: Arc<Endpoint>,
    settings: ChatSettings,
    runtime: Handle,
}

/// The text of an answer, or why there is none.
type ChatText = Result<String, RejectedReply>;

impl Chat {
    /// A model behind an endpoint. Calls block on `runtime`, so they must not come from one of its async tasks.
    pub fn new(endpoint: Arc<Endpoint>, settings: ChatSettings, runtime: Handle) -> Self {
        Self {
            endpoint,
            settings,
            runtime,
        }
    }

    /// The settings.
    pub fn settings(&self) -> &ChatSettings {
        &self.settings
    }

    /// The image as it is sent: enlarged by a whole factor.
    pub fn prepared(&self, image: &Image) -> Image {
        let side = image.width().min(image.height());
        let most = MAX_SIDE / image.width().max(image.height());
        enlarged(
            image,
            self.settings
                .least_side
                .div_ceil(side)
                .clamp(1, most.max(1)),
        )
    }

    /// Asks once. An answer without usable text is no error: it is returned to be kept. What it costs is added to `usage`, whatever comes of it.
    ///
    /// # Errors
    /// If the endpoint cannot be asked at all, or no longer.
    pub fn ask(
        &self,
        question: &ChatQuestion<'_>,
        usage: &mut Usage,
    ) -> Result<ChatText, AdvisorError> {
        let body = self.request(question)?;
        let answer = self
            .runtime
            .block_on(self.endpoint.post(CHAT_PATH, &body, &mut usage.calls));
        match answer {
            Ok(answer) => {
                *usage += tokens_of(&answer);
                Ok(self.text_of(&answer))
            }
            Err(error) if error.is_about_the_request() => {
                Ok(Err(rejected("", &error.code(), &error.to_string())))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn request(&self, question: &ChatQuestion<'_>) -> Result<Value, AdvisorError> {
        let png = STANDARD.encode(question.image.to_png()?);
        let mut body = json!({
            "model": self.settings.model,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            // Seeds of some endpoints are signed 32-bit numbers.
            "seed": question.seed & 0x7FFF_FFFF,
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{png}")}},
                    {"type": "text", "text": question.user},
                ]},
            ],
        });
        if self.settings.send_schema {
            let (name, schema) = question.schema;
            body["response_format"] = json!({
                "type": "json_schema",
                "json_schema": {"name": name, "strict": true, "schema": schema},
            });
        }
        Ok(body)
    }

    /// The text of the first choice: a string, or a list of parts with text.
    fn text_of(&self, body: &Value) -> ChatText {
        let choice = &body["choices"][0];
        let content = &choice["message"]["content"];
        let text = match content {
            Value::String(text) => text.clone(),
            Value::Array(parts) => parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect(),
            _ => String::new(),
        };
        if text.trim().is_empty() {
            return Err(rejected(
                &self.endpoint.without_key(&body.to_string()),
                "no-text",
                "the answer's first choice holds no text",
            ));
        }
        if choice["finish_reason"] == "length" {
            return Err(rejected(
                &text,
                "cut-short",
                "the answer was cut at the limit of tokens",
            ));
        }
        Ok(text)
    }
}

/// An understanding model behind a chat endpoint.
#[derive(Debug, Clone)]
pub struct ChatAdvisor {
    chat: Chat,
    convention: BoxConvention,
}

impl ChatAdvisor {
    /// An advisor whose model writes boxes in `convention`.
    pub fn new(chat: Chat, convention: BoxConvention) -> Self {
        Self { chat, convention }
    }
}

impl Advisor for ChatAdvisor {
    fn name(&self) -> String {
        format!("{} ({TEMPLATE_VERSION})", self.chat.settings.model)
    }

    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError> {
        let sent = self.chat.prepared(question.image);
        let sides = (sent.width(), sent.height());
        let system = system_text(self.convention, sides.0, sides.1);
        let user = user_text(question);
        let schema = reply_schema(question.max_regions);
        let mut advice = Advice::default();
        for attempt in 0..self.chat.settings.tries.max(1) {
            let question_now = ChatQuestion {
                system: &system,
                user: &user,
                image: &sent,
                schema: ("advice", &schema),
                seed: u64::from(attempt),
            };
            let text = match self.chat.ask(&question_now, &mut advice.usage) {
                Err(AdvisorError::Unavailable { source, .. }) => {
                    let so_far = Box::new(advice);
                    return Err(AdvisorError::Unavailable { source, so_far });
                }
                text => text?,
            };
            let parsed = text.and_then(|text| {
                match parse_reply(&text, self.convention, sides, question.max_regions) {
                    Ok(parsed) => Ok((text, parsed)),
                    Err(error) => Err(rejected(&text, error.code(), &error.to_string())),
                }
            });
            match parsed {
                Ok((text, parsed)) => {
                    advice.regions = parsed.regions;
                    advice.rejected_regions = parsed.rejected;
                    advice.raw = Some(text);
                    return Ok(advice);
                }
                Err(reply) => advice.rejected_replies.push(reply),
            }
        }
        Err(AdvisorError::NoUsableReply(Box::new(advice)))
    }
}

/// Most bytes that the text of a rejected reply has in the journal, where a control character takes six: the ten tries that a job may ask
/// for and one accepted answer fit a line.
const MAX_KEPT: usize = 48 << 10;

/// A rejected reply, its text cut to what is kept.
pub(crate) fn rejected(raw: &str, code: &str, reason: &str) -> RejectedReply {
    let mut length = 0;
    let kept = raw.chars().take_while(|character| {
        length += match character {
            '"' | '\\' => 2,
            '\0'..='\u{1f}' => 6,
            other => other.len_utf8(),
        };
        length <= MAX_KEPT
    });
    RejectedReply {
        raw: kept.collect(),
        code: code.to_owned(),
        reason: reason.to_owned(),
    }
}

fn tokens_of(body: &Value) -> Usage {
    let count = |name: &str| body["usage"][name].as_u64().unwrap_or(0);
    Usage {
        calls: 0,
        prompt_tokens: count("prompt_tokens"),
        reply_tokens: count("completion_tokens"),
    }
}

/// Every pixel as a square of `factor` x `factor`.
fn enlarged(image: &Image, factor: u32) -> Image {
    let (width, height) = (image.width() * factor, image.height() * factor);
    let pixels = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| image.at(x / factor, y / factor)))
        .collect();
    Image::new(width, height, pixels).expect("the factor keeps the sides within their bounds")
}
