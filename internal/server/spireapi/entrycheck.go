package spireapi

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/keyset"
)

// The most bytes in an entry's ID, in a SPIFFE ID (SPIFFE-ID, section 2.3) and in
// a hint, which is in every answer to a workload.
const (
	maxEntryID  = 255
	maxSPIFFEID = 2048
	maxHint     = 1024 // as under a SPIRE server
)

// maxEntrySize bounds an entry in the form sent to agents, in bytes. With an entry
// that fits no message, no agent could fetch its entries.
const maxEntrySize = 64 << 10

// EntryError says which field of which entry is invalid, and why.
type EntryError struct {
	Entry   string // the ID, or the SPIFFE ID of an entry without one
	Place   int    // of an entry without an ID in a list, from 1; else 0
	Field   string // as in an entries file: id, spiffe_id, parent_id, ...; or size
	Problem string
}

// Error implements error.
func (e *EntryError) Error() string {
	which := "entry"
	if e.Place > 0 {
		which = fmt.Sprintf("entries[%d]", e.Place-1)
	}
	return fmt.Sprintf("%s %.*q: %s: %s", which, maxEntryID, e.Entry, e.Field, e.Problem)
}

// EntryErrors are the problems of a list of entries, one at least.
type EntryErrors []*EntryError

// Error returns a line for each of the first 20, and the number of the others.
func (e EntryErrors) Error() string {
	var lines []string
	for i, one := range e {
		if i == maxListed {
			lines = append(lines, fmt.Sprintf("and %d more", len(e)-maxListed))
			break
		}
		lines = append(lines, one.Error())
	}
	return strings.Join(lines, "\n")
}

// checkList checks a whole list of entries, which is to replace all others. It returns nil or
// [EntryErrors].
func (s *Server) checkList(entries []Entry) error {
	var wrong EntryErrors
	ids, likes := make(map[string]int, len(entries)), make(map[likeness]int, len(entries))
	for i, e := range entries {
		err := s.checkEntry(e)
		e = canonical(e)
		like := likenesses[0](&e)
		first, twice := ids[e.ID]
		similar, again := likes[like]
		switch {
		case err != nil:
		case e.ID != "" && twice:
			err = problem(e, "id", "is also that of entries[%d]: give each entry a unique name", first-1)
		case again && (e.ID == "" || entries[similar-1].ID == ""):
			err = problem(e, "id", "is needed, because entries[%d] has the same parent_id, spiffe_id and selectors: remove one of them, or give both an id", similar-1)
		}
		if err != nil {
			if e.ID == "" {
				err.Place = i + 1
			}
			wrong = append(wrong, err)
			continue
		}
		ids[e.ID], likes[like] = i+1, cmp.Or(similar, i+1)
	}
	if len(wrong) > 0 {
		return wrong
	}
	return nil
}

func problem(e Entry, field, format string, args ...any) *EntryError {
	return &EntryError{Entry: e.Name(), Field: field, Problem: fmt.Sprintf(format, args...)}
}

// checkEntry returns what is wrong with an entry, nil if nothing is. It may have no ID.
func (s *Server) checkEntry(e Entry) *EntryError {
	wrong := func(field, format string, args ...any) *EntryError { return problem(e, field, format, args...) }
	switch {
	case len(e.ID) > maxEntryID:
		return wrong("id", "is longer than %d bytes", maxEntryID)
	case !e.SPIFFEID.MemberOf(s.td):
		return wrong("spiffe_id", "%q is not of trust domain %q", e.SPIFFEID, s.td.Name())
	case e.SPIFFEID.Path() == "":
		return wrong("spiffe_id", "%q has no path", e.SPIFFEID)
	case len(e.SPIFFEID.String()) > maxSPIFFEID:
		return wrong("spiffe_id", "is longer than %d bytes", maxSPIFFEID)
	case isReservedPath(e.SPIFFEID.Path()):
		return wrong("spiffe_id", "%q is reserved for servers and agents", e.SPIFFEID)
	case !e.ParentID.IsZero() && !e.ParentID.MemberOf(s.td):
		return wrong("parent_id", "%q is not of trust domain %q", e.ParentID, s.td.Name())
	case !e.ParentID.IsZero() && !isParentPath(e.ParentID.Path()):
		return wrong("parent_id", "%q is neither an agent's ID nor that of an alias: name one of them, or leave it out for all agents", e.ParentID)
	case len(e.ParentID.String()) > maxSPIFFEID:
		return wrong("parent_id", "is longer than %d bytes", maxSPIFFEID)
	case !e.Operator && !e.IsAlias() && !strings.HasPrefix(e.ParentID.Path(), agentPath) && s.config.IsOperator(e.SPIFFEID):
		return wrong("parent_id", "does not name one agent, and %q is an operator's ID, so several agents could act as that operator: name the agent that serves the entry, or set operator: true to allow every agent", e.SPIFFEID)
	case len(e.Selectors) == 0:
		return wrong("selectors", "is empty, so the entry would match every workload: add a selector")
	case len(e.Hint) > maxHint:
		return wrong("hint", "is longer than %d bytes", maxHint)
	case e.JWTTTL != 0 && e.JWTTTL < time.Second:
		return wrong("jwt_ttl", "%v is shorter than a second", e.JWTTTL)
	case !e.ExpiresAt.IsZero() && (e.ExpiresAt.Unix() <= 0 || e.ExpiresAt.Nanosecond() != 0):
		return wrong("expires_at", "%v is not a time in full seconds after 1970", e.ExpiresAt)
	case slices.Contains(e.FederatesWith, s.td):
		return wrong("federates_with", "%q is the entry's own trust domain", s.td.Name())
	}
	for _, sel := range e.Selectors {
		if sel.Type == "" || sel.Value == "" || strings.Contains(sel.Type, ":") {
			return wrong("selectors", "%q is not of the form type:value", sel.Type+":"+sel.Value)
		}
	}
	for _, td := range e.FederatesWith {
		if err := config.CheckTrustDomain(td.Name()); err != nil {
			return wrong("federates_with", "%q %v", td.Name(), err)
		}
	}
	if err := keyset.CheckDNSNames(e.DNSNames); err != nil {
		return wrong("dns_names", "%v", err)
	}
	if err := checkX509TTL(e.X509TTL); err != nil {
		return wrong("x509_ttl", "%v", err)
	}
	stored := StoredEntry{Entry: e}
	if n := proto.Size(stored.Proto(e.ParentID, nil)); n > maxEntrySize {
		return wrong("size", "is %d bytes, more than %d: shorten selectors, federates_with or dns_names", n, maxEntrySize)
	}
	return nil
}

// isReservedPath reports whether workloads and aliases cannot have a path.
func isReservedPath(path string) bool { return path == "/spire" || strings.HasPrefix(path, "/spire/") }

// isParentPath reports whether a path can be that of a parent: of an agent, of the server,
// or of an alias or workload.
func isParentPath(path string) bool {
	return strings.HasPrefix(path, agentPath) || path == serverPath || path != "" && !isReservedPath(path)
}

// maxListed bounds how many entries [Server.logInvalidEntries] lists.
const maxListed = 20

// logInvalidEntries logs the stored entries that checkEntry refuses: they are
// older than the rule, or their SPIFFE ID has become an operator's since. They are
// served all the same.
func (s *Server) logInvalidEntries() {
	refused := 0
	for _, e := range s.entries.Load().sorted {
		err := s.checkEntry(e.Entry)
		if err == nil {
			continue
		}
		if refused++; refused <= maxListed {
			s.log.Warn("stored entry would be refused", "entry_id", e.ID, "spiffe_id", e.SPIFFEID.String(), "error", err)
		}
	}
	if refused > maxListed {
		s.log.Warn("more stored entries would be refused", "listed", maxListed, "refused", refused)
	}
}

func checkX509TTL(ttl time.Duration) error {
	if ttl != 0 && (ttl < keyset.MinX509TTL || ttl > keyset.MaxX509TTL) {
		return fmt.Errorf("%v is not within %v to %v", ttl, keyset.MinX509TTL, keyset.MaxX509TTL)
	}
	return nil
}

// canonical copies a valid entry and sorts the fields whose order has no meaning,
// so that equal entries compare equal.
func canonical(e Entry) Entry {
	e.Selectors = slices.Clone(e.Selectors)
	slices.SortFunc(e.Selectors, func(a, b Selector) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
	})
	e.Selectors = slices.Compact(e.Selectors)
	e.FederatesWith = slices.Clone(e.FederatesWith)
	slices.SortFunc(e.FederatesWith, spiffeid.TrustDomain.Compare)
	e.FederatesWith = slices.Compact(e.FederatesWith)
	if !e.ExpiresAt.IsZero() {
		e.ExpiresAt = e.ExpiresAt.UTC()
	}
	e.DNSNames = slices.Clone(e.DNSNames)
	for i, name := range e.DNSNames {
		e.DNSNames[i] = strings.ToLower(name)
	}
	return e
}

func equalEntry(a, b Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID && a.Operator == b.Operator && a.Hint == b.Hint &&
		a.X509TTL == b.X509TTL && a.JWTTTL == b.JWTTTL &&
		a.DisableX509SVIDPrefetch == b.DisableX509SVIDPrefetch && a.JWTSVIDIncludeJTI == b.JWTSVIDIncludeJTI &&
		a.ExpiresAt.Equal(b.ExpiresAt) &&
		slices.Equal(a.Selectors, b.Selectors) && slices.Equal(a.FederatesWith, b.FederatesWith) &&
		slices.Equal(a.DNSNames, b.DNSNames)
}
