//! Reads Python pickles as data: what a pickle would call is noted and never called.
//!
//! Every value lies in one arena and is named by its index, so that a hostile pickle can neither grow by copies of copies nor
//! nest so deep that dropping it overflows the stack; memory stays in proportion to the bytes read.

use std::collections::HashMap;
use std::io::{BufRead, Read};

/// Index of a value in its pickle.
pub(super) type Id = usize;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// `None`, and what no state dict needs: floats, bytes, sets.
    Other,
    Integer(i64),
    Text(String),
    /// A tuple or a list.
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// `module.name`.
    Global(String),
    /// A call that unpickling would make.
    Call {
        function: Id,
        arguments: Id,
    },
    /// A reference to something outside of the pickle: PyTorch's storages.
    Persistent(Id),
}

/// A pickle whose outermost value is [`Pickle::top`].
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    pub(super) top: Id,
}

/// Longest text, so that a length in a damaged file does not ask for all memory at once.
const LONGEST: usize = 1 << 20;

impl Pickle {
    /// Reads one pickle of any protocol up to 5, and nothing behind it.
    pub(super) fn read(reader: &mut impl BufRead) -> Result<Self, String> {
        let mut machine = Machine {
            reader,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let top = loop {
            let code = machine.byte()?;
            if code == b'.' {
                break machine.pop()?;
            }
            machine.step(code)?;
        };
        Ok(Self {
            values: machine.values,
            top,
        })
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::Other)
    }

    /// What the pickle refers to outside of itself.
    pub(super) fn persistent(&self) -> impl Iterator<Item = Id> {
        self.values.iter().filter_map(|value| match value {
            Value::Persistent(id) => Some(*id),
            _ => None,
        })
    }

    pub(super) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A count or an offset.
    pub(super) fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Value::Integer(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        self.sequence(id)?.iter().map(|&i| self.size(i)).collect()
    }

    /// The entry of a dictionary.
    pub(super) fn entry(&self, dict: Id, key: &str) -> Option<Id> {
        self.dict(dict)?
            .iter()
            .rev()
            .find(|(k, _)| self.text(*k) == Some(key))
            .map(|(_, value)| *value)
    }

    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// Name and arguments of a call.
    pub(super) fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        let Value::Call {
            function,
            arguments,
        } = self.get(id)
        else {
            return None;
        };
        match self.get(*function) {
            Value::Global(name) => Some((name, self.sequence(*arguments)?)),
            _ => None,
        }
    }
}

/// The stack machine that pickles are programs for.
struct Machine<'a, R> {
    reader: &'a mut R,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Lengths of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

impl<R: BufRead> Machine<'_, R> {
    fn step(&mut self, code: u8) -> Result<(), String> {
        match code {
            // Protocol and frames.
            0x80 => drop(self.bytes(1)?),
            0x95 => drop(self.bytes(8)?),
            b'N' | 0x88 | 0x89 | 0x8f | b'K' | b'M' | b'J' | 0x8a | b'G' => self.constant(code)?,
            b'X' | b'T' => self.counted_text(4)?,
            0x8c | b'U' => self.counted_text(1)?,
            0x8d => self.counted_text(8)?,
            b'C' => self.counted_bytes(1)?,
            b'B' => self.counted_bytes(4)?,
            0x8e => self.counted_bytes(8)?,
            b']' | b')' | b'}' | 0x85..=0x87 | b'(' | b't' | b'l' | b'd' => self.container(code)?,
            b'a' | b'e' | 0x90 | b's' | b'u' => self.add(code)?,
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(code)?,
            b'c' | 0x93 | b'R' | 0x81 | b'Q' => self.reference(code)?,
            // What is built is left without its state: attributes, which no state dict needs.
            b'0' | b'b' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            other => return Err(format!("its pickle holds the unknown code {other:#04x}")),
        }
        Ok(())
    }

    fn constant(&mut self, code: u8) -> Result<(), String> {
        let value = match code {
            b'K' => Value::Integer(self.number(1)?),
            b'M' => Value::Integer(self.number(2)?),
            // Four bytes with a sign.
            b'J' => Value::Integer((self.number(4)? as u32 as i32).into()),
            0x8a => {
                let length = self.byte()?;
                self.long(length.into())?
            }
            b'G' => {
                self.bytes(8)?;
                Value::Other
            }
            _ => Value::Other,
        };
        self.push(value);
        Ok(())
    }

    /// Makes a tuple, a list or a dictionary, or opens a mark.
    fn container(&mut self, code: u8) -> Result<(), String> {
        match code {
            b'}' => self.push(Value::Dict(Vec::new())),
            0x85..=0x87 => {
                let count = usize::from(code) - 0x84;
                let start = self.stack.len().checked_sub(count).ok_or(EMPTY)?;
                let items = self.stack.split_off(start);
                self.push(Value::Sequence(items));
            }
            b'(' => self.marks.push(self.stack.len()),
            b't' | b'l' => {
                let items = self.since_mark()?;
                self.push(Value::Sequence(items));
            }
            b'd' => {
                let items = self.since_mark()?;
                self.push(Value::Dict(pairs(&items)?));
            }
            _ => self.push(Value::Sequence(Vec::new())),
        }
        Ok(())
    }

    /// Adds to the list or dictionary at the top of the stack.
    fn add(&mut self, code: u8) -> Result<(), String> {
        match code {
            b'a' => {
                let item = self.pop()?;
                self.extend(&[item])
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])
            }
            b'u' => {
                let items = self.since_mark()?;
                self.insert(&items)
            }
            _ => {
                let items = self.since_mark()?;
                self.extend(&items)
            }
        }
    }

    /// Keeps the top of the stack under a number, or takes what was kept.
    fn memory(&mut self, code: u8) -> Result<(), String> {
        let place = match code {
            b'q' | b'h' => self.number(1)?,
            b'r' | b'j' => self.number(4)?,
            _ => self.memo.len() as i64,
        } as usize;
        if matches!(code, b'h' | b'j') {
            let kept = self.memo.get(&place);
            let kept = kept.ok_or("its pickle refers to a value that it does not hold")?;
            self.stack.push(*kept);
        } else {
            let top = self.top()?;
            self.memo.insert(place, top);
        }
        Ok(())
    }

    /// What unpickling would look up and call.
    fn reference(&mut self, code: u8) -> Result<(), String> {
        let value = match code {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Value::Global(format!("{module}.{name}"))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let text = |id| match self.values.get(id) {
                    Some(Value::Text(text)) => Ok(text.as_str()),
                    _ => Err("its pickle names a function by something that is no text"),
                };
                Value::Global(format!("{}.{}", text(module)?, text(name)?))
            }
            b'Q' => Value::Persistent(self.pop()?),
            _ => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.called(function, arguments)
            }
        };
        self.push(value);
        Ok(())
    }

    /// An ordered dictionary is a dictionary; every other call stays what it is.
    fn called(&self, function: Id, arguments: Id) -> Value {
        match self.values.get(function) {
            Some(Value::Global(name))
                if ["collections.OrderedDict", "collections.defaultdict"]
                    .contains(&name.as_str()) =>
            {
                Value::Dict(Vec::new())
            }
            _ => Value::Call {
                function,
                arguments,
            },
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, String> {
        Ok(self.stack.pop().ok_or(EMPTY)?)
    }

    fn top(&self) -> Result<Id, String> {
        Ok(self.stack.last().copied().ok_or(EMPTY)?)
    }

    /// What was pushed since the last open mark.
    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let start = self.marks.pop().filter(|start| *start <= self.stack.len());
        Ok(self.stack.split_off(start.ok_or(EMPTY)?))
    }

    /// Adds to the list at the top of the stack; a set's items are not kept.
    fn extend(&mut self, items: &[Id]) -> Result<(), String> {
        let top = self.top()?;
        if let Some(Value::Sequence(list)) = self.values.get_mut(top) {
            list.extend_from_slice(items);
        }
        Ok(())
    }

    /// Adds to the dictionary at the top of the stack.
    fn insert(&mut self, items: &[Id]) -> Result<(), String> {
        let (top, new) = (self.top()?, pairs(items)?);
        if let Some(Value::Dict(entries)) = self.values.get_mut(top) {
            entries.extend(new);
        }
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, String> {
        let mut byte = [0];
        self.reader
            .read_exact(&mut byte)
            .map_err(|e| format!("its pickle ends early: {e}"))?;
        Ok(byte[0])
    }

    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, String> {
        if count > LONGEST {
            return Err(format!("its pickle holds a text of {count} bytes"));
        }
        let mut bytes = vec![0; count];
        self.reader
            .read_exact(&mut bytes)
            .map_err(|e| format!("its pickle ends early: {e}"))?;
        Ok(bytes)
    }

    /// An integer of up to eight bytes, the lowest first.
    fn number(&mut self, bytes: usize) -> Result<i64, String> {
        let mut all = [0; 8];
        for byte in all.iter_mut().take(bytes) {
            *byte = self.byte()?;
        }
        Ok(i64::from_le_bytes(all))
    }

    /// An integer of any length, of which only those matter that fit into 64 bits.
    fn long(&mut self, length: usize) -> Result<Value, String> {
        let bytes = self.bytes(length)?;
        if bytes.len() > 8 {
            return Ok(Value::Other);
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        for (to, from) in all.iter_mut().zip(&bytes) {
            *to = *from;
        }
        Ok(Value::Integer(i64::from_le_bytes(all)))
    }

    fn counted(&mut self, length_bytes: usize) -> Result<Vec<u8>, String> {
        let length = self.number(length_bytes)?;
        let length = usize::try_from(length).map_err(|_| "its pickle holds a negative length")?;
        self.bytes(length)
    }

    fn counted_text(&mut self, length_bytes: usize) -> Result<(), String> {
        let text = String::from_utf8(self.counted(length_bytes)?);
        self.push(text.map_or(Value::Other, Value::Text));
        Ok(())
    }

    fn counted_bytes(&mut self, length_bytes: usize) -> Result<(), String> {
        self.counted(length_bytes)?;
        self.push(Value::Other);
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = Vec::new();
        let mut limited = Read::take(&mut *self.reader, LONGEST as u64);
        limited
            .read_until(b'\n', &mut line)
            .map_err(|e| format!("its pickle ends early: {e}"))?;
        if line.pop() != Some(b'\n') {
            return Err("its pickle ends early".into());
        }
        String::from_utf8(line).map_err(|_| "its pickle names a function that is no text".into())
    }
}

const EMPTY: &str = "its pickle takes more values than it holds";

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    if !items.len().is_multiple_of(2) {
        return Err("its pickle holds a dictionary with a key that has no value".into());
    }
    Ok(items.chunks_exact(2).map(|p| (p[0], p[1])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_read_and_calls_are_not_made() {
        // {'a': os.system('rm'), 'b': (1, -2, 70000)} in protocol 2.
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00acos\nsystem\nX\x02\x00\x00\x00rm\x85R\
            X\x01\x00\x00\x00bK\x01J\xfe\xff\xff\xffJ\x70\x11\x01\x00\x87u.";
        let pickle = Pickle::read(&mut &bytes[..]).unwrap();
        let call = pickle.entry(pickle.top, "a").unwrap();
        let (name, arguments) = pickle.call(call).unwrap();
        assert_eq!((name, pickle.text(arguments[0])), ("os.system", Some("rm")));
        let numbers = pickle.entry(pickle.top, "b").unwrap();
        let items = pickle.sequence(numbers).unwrap();
        let items: Vec<_> = items.iter().map(|&i| pickle.get(i).clone()).collect();
        assert_eq!(items, [1, -2, 70_000].map(Value::Integer));
        assert_eq!(pickle.sizes(numbers), None);
    }

    #[test]
    fn copies_of_copies_stay_small() {
        // Each line doubles what the one before holds: 2^10000 values if they were copied.
        let mut bytes = b"\x80\x02]q\x00".to_vec();
        for _ in 0..10_000 {
            bytes.extend(b"h\x00h\x00\x86q\x00");
        }
        bytes.push(b'.');
        let pickle = Pickle::read(&mut &bytes[..]).unwrap();
        assert_eq!(pickle.values.len(), 10_001);
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pickle::read(&mut &bytes[..]);
        }

        #[test]
        fn any_program_ends_in_a_value_or_an_error(
            codes in proptest::collection::vec(proptest::sample::select(
                &b"NKMJX])}(tdaesuqhrj012cRbQ.\x80\x81\x85\x86\x87\x8a\x8c\x90\x93\x94\n\x01\x00"[..]), 0..200)
        ) {
            let _ = Pickle::read(&mut &codes[..]);
        }
    }
}
