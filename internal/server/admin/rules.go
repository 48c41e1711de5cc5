package admin

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Role says what a caller may do.
type Role int

// The roles. Each includes those before it.
const (
	NoRole Role = iota
	Reader
	Manager
)

func (r Role) String() string { return [...]string{"none", "reader", "manager"}[r] }

// Rules map callers to roles. They are immutable.
type Rules struct{ managers, readers list }

// list holds the rules of a role.
type list struct {
	uids, gids map[uint32]bool
	ids        map[spiffeid.ID]bool
}

// ParseRules parses the rules of both roles:
//
//	unix:uid:1000    unix:user:alice    the user of a process at the admin socket
//	unix:gid:1000    unix:group:ops     one of that process's groups
//	spiffe://example.org/ops/alice      the SPIFFE ID of a remote operator, exactly
//
// User and group names are resolved now. If both lists are empty, root and the user of
// this process are managers; only root if that user has the overflow ID. An error names
// the field, the value and the remedy.
func ParseRules(td spiffeid.TrustDomain, managers, readers []string) (Rules, error) {
	if len(managers)+len(readers) == 0 {
		managers = []string{"unix:uid:0"}
		if own := os.Geteuid(); !isOverflowID("uid", uint32(own)) {
			managers = append(managers, "unix:uid:"+strconv.Itoa(own))
		}
	}
	m, err := parseList(td, "operators.managers", managers)
	r, err2 := parseList(td, "operators.readers", readers)
	return Rules{managers: m, readers: r}, errors.Join(err, err2)
}

func parseList(td spiffeid.TrustDomain, field string, texts []string) (list, error) {
	l := list{uids: map[uint32]bool{}, gids: map[uint32]bool{}, ids: map[spiffeid.ID]bool{}}
	var errs []error
	for i, text := range texts {
		if err := l.add(td, text); err != nil {
			errs = append(errs, fmt.Errorf("%s[%d]: %q %w", field, i, text, err))
		}
	}
	return l, errors.Join(errs...)
}

func (l *list) add(td spiffeid.TrustDomain, text string) error {
	if strings.HasPrefix(text, "spiffe://") {
		id, err := spiffeid.FromString(text)
		switch {
		case err != nil:
			return fmt.Errorf("is not a SPIFFE ID: %w", err)
		case !id.MemberOf(td):
			return fmt.Errorf("is not of trust domain %s: operators need an SVID of it", td)
		case id.Path() == "":
			return errors.New("has no path: name one operator's ID")
		}
		l.ids[id] = true
		return nil
	}
	kind, value, _ := strings.Cut(strings.TrimPrefix(text, "unix:"), ":")
	if !strings.HasPrefix(text, "unix:") || value == "" {
		return errors.New("is no rule: write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:NAME or a SPIFFE ID")
	}
	into, number, numbers := l.uids, value, "uid"
	switch kind {
	case "uid":
	case "user":
		u, err := user.Lookup(value)
		if err != nil {
			return fmt.Errorf("names a user that this machine does not have: %w", err)
		}
		number = u.Uid
	case "gid":
		into, numbers = l.gids, "gid"
	case "group":
		g, err := user.LookupGroup(value)
		if err != nil {
			return fmt.Errorf("names a group that this machine does not have: %w", err)
		}
		into, number, numbers = l.gids, g.Gid, "gid"
	default:
		return errors.New("is no rule: write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:NAME or a SPIFFE ID")
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return errors.New("has no number that could be an ID")
	}
	if isOverflowID(numbers, uint32(n)) {
		return errors.New("is the overflow ID, which stands for all users or groups outside this user namespace: give another, or map all IDs into the server's user namespace")
	}
	into[uint32(n)] = true
	return nil
}

// isOverflowID reports whether id is the overflow ID of kind "uid" or "gid", which stands
// for all users or groups that are not mapped into the process's user namespace:
// user_namespaces(7), "Unmapped user and group IDs".
func isOverflowID(kind string, id uint32) bool {
	mapped, err := os.ReadFile("/proc/self/" + kind + "_map")
	if err == nil && slices.Equal(strings.Fields(string(mapped)), []string{"0", "0", "4294967295"}) {
		return false // all IDs are mapped
	}
	overflow := "65534"
	if text, err := os.ReadFile("/proc/sys/kernel/overflow" + kind); err == nil {
		overflow = strings.TrimSpace(string(text))
	}
	return strconv.FormatUint(uint64(id), 10) == overflow
}

func (r Rules) processRole(p process) Role {
	switch {
	case r.managers.has(p):
		return Manager
	case r.readers.has(p):
		return Reader
	}
	return NoRole
}

// IsOperator reports whether a SPIFFE ID has a role.
func (r Rules) IsOperator(id spiffeid.ID) bool { return r.idRole(id) != NoRole }

func (r Rules) idRole(id spiffeid.ID) Role {
	switch {
	case r.managers.ids[id]:
		return Manager
	case r.readers.ids[id]:
		return Reader
	}
	return NoRole
}

func (l list) has(p process) bool {
	return l.uids[p.uid] || slices.ContainsFunc(p.gids, func(g uint32) bool { return l.gids[g] })
}
