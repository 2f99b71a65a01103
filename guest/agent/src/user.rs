//! Who a command runs as: `USER` of an image, looked up in the image's own /etc/passwd and /etc/group.
//!
//! The rules are Docker's: `name`, `uid`, `name:group`, `uid:gid`, in any mixture. A number need not be in the files;
//! a name must. What is all digits is a number even if some user is called so. The files come with an image and can
//! hold anything: a line that is not as passwd(5) or group(5) say is passed over, never guessed at.

use alloc::vec;
use alloc::vec::Vec;

/// The most groups a user may be in.
const MAX_GROUPS: usize = 1024;
/// The largest id: the one above is how the kernel writes "unchanged", and Docker stops at half.
const MAX_ID: u32 = i32::MAX as u32;

/// What a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The user.
    pub(crate) uid: u32,
    /// The user's group.
    pub(crate) gid: u32,
    /// All groups, `gid` first.
    pub(crate) groups: Vec<u32>,
    /// The user's home directory; `/` for a user in no file.
    pub(crate) home: Vec<u8>,
}

/// Why there is no such identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnknownUser {
    /// A name that is not in /etc/passwd.
    #[error("no such user in the image's /etc/passwd")]
    User,
    /// A name that is not in /etc/group.
    #[error("no such group in the image's /etc/group")]
    Group,
    /// A number no user can have.
    #[error("user and group ids end at {MAX_ID}")]
    Range,
    /// A user in more groups than anybody needs.
    #[error("the user is in more than {MAX_GROUPS} groups")]
    TooManyGroups,
}

/// Finds out who `wanted` is; empty means user 0. `passwd` and `group` are the contents of the files.
///
/// # Errors
/// [`UnknownUser`].
pub(crate) fn resolve(wanted: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, UnknownUser> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, group),
        None => (wanted, ""),
    };
    let uid = if user.is_empty() { Some(0) } else { number(user.as_bytes())? };
    let entry = users(passwd).find(|entry| match uid {
        Some(uid) => entry.uid == uid,
        None => entry.name == user.as_bytes(),
    });
    let (uid, own_gid, home) = match (&entry, uid) {
        (Some(entry), _) => (entry.uid, entry.gid, entry.home.to_vec()),
        (None, Some(uid)) => (uid, 0, b"/".to_vec()),
        (None, None) => return Err(UnknownUser::User),
    };

    if !wanted_group.is_empty() {
        let gid = match number(wanted_group.as_bytes())? {
            Some(gid) => gid,
            None => groups(group)
                .find(|entry| entry.name == wanted_group.as_bytes())
                .map(|entry| entry.gid)
                .ok_or(UnknownUser::Group)?,
        };
        return Ok(Identity { uid, gid, groups: vec![gid], home });
    }

    let mut all = vec![own_gid];
    if let Some(entry) = entry {
        for group in groups(group).filter(|group| group.has_member(entry.name)) {
            if !all.contains(&group.gid) {
                all.push(group.gid);
            }
            if all.len() > MAX_GROUPS {
                return Err(UnknownUser::TooManyGroups);
            }
        }
    }
    Ok(Identity { uid, gid: own_gid, groups: all, home })
}

/// A user as passwd(5) has it: `name:password:uid:gid:comment:home:shell`.
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// A group as group(5) has it: `name:password:gid:member,member`.
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl Group<'_> {
    fn has_member(&self, name: &[u8]) -> bool {
        !name.is_empty() && self.members.split(|byte| *byte == b',').any(|member| member == name)
    }
}

fn users(passwd: &[u8]) -> impl Iterator<Item = User<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (id(fields.next()?)?, id(fields.next()?)?);
        let (_comment, home) = (fields.next()?, fields.next()?);
        Some(User { name, uid, gid, home: if home.is_empty() { b"/" } else { home } })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let (name, _password) = (fields.next()?, fields.next()?);
        Some(Group { name, gid: id(fields.next()?)?, members: fields.next()? })
    })
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.starts_with(b"#"))
}

fn id(field: &[u8]) -> Option<u32> {
    number(field).ok().flatten()
}

/// The number that `text` is, or `None` when it is a name.
fn number(text: &[u8]) -> Result<Option<u32>, UnknownUser> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Ok(None);
    }
    let value = text.iter().try_fold(0_u32, |value, digit| {
        value.checked_mul(10)?.checked_add(u32::from(digit - b'0')).filter(|value| *value <= MAX_ID)
    });
    value.map(Some).ok_or(UnknownUser::Range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        app:x:1000:1001:App,,,:/home/app:/bin/sh\n\
        55:x:7:7::/seven:\n\
        broken:x:zero:0::/:\n\
        short:x:5\n\
        nohome:x:20:20:::\n\
        app:x:2000:2000:second:/no:/bin/sh\n";
    const GROUP: &[u8] =
        b"root:x:0:root\nwheel:x:10:root,app\napps:x:1001:app\naudio:x:29:app,other\nbad:x:x:app\n";

    fn resolved(wanted: &str) -> Result<(u32, u32, Vec<u32>, String), UnknownUser> {
        resolve(wanted, PASSWD, GROUP)
            .map(|who| (who.uid, who.gid, who.groups, String::from_utf8(who.home).expect("an ASCII path")))
    }

    #[test]
    fn nobody_named_is_root_with_roots_groups() {
        assert_eq!(resolved(""), Ok((0, 0, vec![0, 10], "/root".into())));
        assert_eq!(resolved("root"), resolved(""));
        assert_eq!(resolved("0"), resolved(""));
    }

    #[test]
    fn a_name_has_its_own_group_first_and_then_all_it_is_a_member_of() {
        assert_eq!(resolved("app"), Ok((1000, 1001, vec![1001, 10, 29], "/home/app".into())));
    }

    #[test]
    fn a_number_in_the_file_is_that_user() {
        assert_eq!(resolved("1000"), resolved("app"));
    }

    #[test]
    fn a_number_in_no_file_stands_for_itself_in_group_0() {
        assert_eq!(resolved("4242"), Ok((4242, 0, vec![0], "/".into())));
        assert_eq!(resolved("4242:17"), Ok((4242, 17, vec![17], "/".into())));
    }

    #[test]
    fn a_group_named_leaves_the_others_out() {
        assert_eq!(resolved("app:audio"), Ok((1000, 29, vec![29], "/home/app".into())));
        assert_eq!(resolved("app:5"), Ok((1000, 5, vec![5], "/home/app".into())));
        assert_eq!(resolved(":audio"), Ok((0, 29, vec![29], "/root".into())));
    }

    #[test]
    fn digits_are_a_number_even_when_a_user_is_called_so() {
        assert_eq!(resolved("55"), Ok((55, 0, vec![0], "/".into())));
    }

    #[test]
    fn an_unknown_name_is_refused() {
        assert_eq!(resolved("nobody"), Err(UnknownUser::User));
        assert_eq!(resolved("app:nogroup"), Err(UnknownUser::Group));
        assert_eq!(resolve("root", b"", b""), Err(UnknownUser::User));
    }

    #[test]
    fn a_broken_line_is_nobody() {
        assert_eq!(resolved("broken"), Err(UnknownUser::User));
        assert_eq!(resolved("short"), Err(UnknownUser::User));
        assert_eq!(resolved("app:bad"), Err(UnknownUser::Group));
        assert_eq!(resolved("-1"), Err(UnknownUser::User));
        assert_eq!(resolved("+5"), Err(UnknownUser::User));
    }

    #[test]
    fn a_user_without_home_lives_at_the_root() {
        assert_eq!(resolved("nohome"), Ok((20, 20, vec![20], "/".into())));
    }

    #[test]
    fn an_id_that_would_wrap_around_is_refused() {
        for wanted in ["4294967296", "4294967295", "2147483648", "99999999999999999999", "1:4294967296"] {
            assert_eq!(resolved(wanted), Err(UnknownUser::Range), "{wanted}");
        }
        assert_eq!(resolved("2147483647").map(|who| who.0), Ok(MAX_ID));
        assert_eq!(resolve("evil", b"evil:x:4294967296:0::/:\n", b""), Err(UnknownUser::User));
    }

    #[test]
    fn a_user_in_too_many_groups_is_refused() {
        let lines: Vec<String> = (1..3000).map(|gid| format!("g{gid}:x:{gid}:root\n")).collect();
        assert_eq!(resolve("root", PASSWD, lines.concat().as_bytes()), Err(UnknownUser::TooManyGroups));
    }

    proptest! {
        #[test]
        fn any_files_give_an_identity_or_a_refusal(
            wanted in "[a-z0-9:+-]{0,12}",
            passwd in prop::collection::vec(any::<u8>(), 0..400),
            group in "([a-z]{0,3}:x?:[0-9]{0,12}:[a-z,]{0,9}\n){0,20}",
        ) {
            if let Ok(who) = resolve(&wanted, &passwd, group.as_bytes()) {
                prop_assert!(who.uid <= MAX_ID && who.groups.len() <= MAX_GROUPS && who.groups[0] == who.gid);
            }
        }
    }
}
