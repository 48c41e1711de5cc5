package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/selector"
	"github.com/renewd/renewd/internal/server/keyset"
)

// importCommand is "entries import".
func importCommand(_ context.Context, call *cli.Call) error {
	trustDomain := call.Flags.String("trust-domain", call.Getenv("TRUST_DOMAIN"), "")
	files, err := call.Parse("file")
	if err != nil {
		return err
	}
	if err := checkTrustDomainFlag(call, *trustDomain); err != nil {
		return err
	}
	name, data, err := readEntries(call, files[0])
	if err != nil {
		return err
	}
	list := &imported{trustDomain: *trustDomain, trustDomains: map[string]int{}, counts: map[string]int{}}
	if err := list.convert(data); err != nil {
		return fmt.Errorf("%s: %s %w", call.Name(), name, err)
	}
	return errors.Join(printFile(call.Stdout, list.entries), cli.Printf(call.Stderr, "%s", list.report()))
}

// imported is a list of entries of a SPIRE server in this server's form.
type imported struct {
	trustDomain string // entries of others are left out; none when empty

	entries      []*shownEntry
	notes        []string
	read         int
	trustDomains map[string]int // entries by trust domain
	counts       map[string]int // entries with each of notCarriedOver
	joined       []string       // entries below agents that joined with a token
}

// notCarriedOver are SPIRE's attributes of entries that this server does not have, and what
// there is instead.
var notCarriedOver = []struct {
	name string
	set  func(*types.Entry) bool
	note string
}{
	{"admin", (*types.Entry).GetAdmin, "admin is not carried over: an entry gives no access to this server's API; to give it, name the SPIFFE ID in operators of the server's configuration"},
	{"downstream", (*types.Entry).GetDownstream, "downstream is not carried over: this server signs no certificates of downstream servers"},
	{"store_svid", (*types.Entry).GetStoreSvid, "left out: store_svid has agents store the SVID elsewhere, which this server's agents do not"},
}

// convert converts what "spire-server entry show -output json" of SPIRE 1.13 to 1.16 prints.
// Its error continues a sentence that begins with the file.
func (l *imported) convert(data []byte) error {
	var list struct {
		Entries       *[]json.RawMessage `json:"entries"`
		NextPageToken string             `json:"next_page_token"`
	}
	err := json.Unmarshal(data, &list)
	if err == nil && list.Entries == nil {
		err = errors.New(`it has no list "entries"`)
	}
	if err != nil {
		return fmt.Errorf("is not what \"spire-server entry show -output json\" prints: %w", err)
	}
	if list.NextPageToken != "" {
		return errors.New("is only the first page of a list: give all entries in one list")
	}
	for i, raw := range *list.Entries {
		var e types.Entry
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, &e); err != nil {
			return fmt.Errorf("is not what \"spire-server entry show -output json\" prints: entries[%d]: %w", i, err)
		}
		l.add(&e, unknown(e.ProtoReflect().Descriptor(), raw))
	}
	return nil
}

func (l *imported) add(in *types.Entry, unknown []string) {
	l.read++
	out := &shownEntry{
		ID: in.GetId(), SPIFFEID: idText(in.GetSpiffeId()), ParentID: idText(in.GetParentId()), Hint: in.GetHint(),
		FederatesWith: in.GetFederatesWith(), DNSNames: in.GetDnsNames(),
		DisableX509SVIDPrefetch: in.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JWTSVIDIncludeJTI:       in.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
	}
	note := func(text string) {
		l.notes = append(l.notes, fmt.Sprintf("entry %q: %s", cmp.Or(out.ID, out.SPIFFEID), text))
	}
	for _, a := range notCarriedOver {
		if a.set(in) {
			l.counts[a.name]++
			note(a.note)
		}
	}
	if in.GetStoreSvid() {
		return
	}
	td := in.GetSpiffeId().GetTrustDomain()
	if l.trustDomains[td]++; l.trustDomain != "" && td != l.trustDomain {
		note(fmt.Sprintf("left out: it is of trust domain %q, not %q", td, l.trustDomain))
		return
	}
	for _, name := range unknown {
		note(name + " is not carried over: this program does not know the field")
	}
	for _, s := range in.GetSelectors() {
		out.Selectors = append(out.Selectors, s.GetType()+":"+s.GetValue())
	}
	if at := in.GetExpiresAt(); at != 0 {
		out.ExpiresAt = time.Unix(at, 0).UTC().Format(time.RFC3339)
	}
	if ttl := time.Duration(in.GetX509SvidTtl()) * time.Second; ttl != 0 {
		allowed := min(max(ttl, keyset.MinX509TTL), keyset.MaxX509TTL)
		if out.X509TTL = config.Short(allowed); ttl != allowed {
			note(fmt.Sprintf("x509_ttl becomes %s: the lifetime of its X.509-SVIDs, %s, is not from %s to %s", out.X509TTL, config.Short(ttl), config.Short(keyset.MinX509TTL), config.Short(keyset.MaxX509TTL)))
		}
	}
	if ttl := in.GetJwtSvidTtl(); ttl != 0 {
		out.JWTTTL = config.Short(time.Duration(ttl) * time.Second)
	}
	switch path := in.GetParentId().GetPath(); {
	case path == "/spire/agent": // every agent, as this server's own SPIRE API lists it
		out.ParentID = ""
	case strings.HasPrefix(path, "/spire/agent/join_token/"):
		l.joined = append(l.joined, cmp.Or(out.ID, out.SPIFFEID))
	}
	var file strings.Builder
	err := printFile(&file, []*shownEntry{out})
	if err == nil {
		_, err = parseEntries("", []byte(file.String()))
	}
	if err != nil {
		var reasons []string
		if wrong, ok := errors.AsType[config.Error](err); ok {
			for _, p := range wrong {
				p.Where, p.Path = "", strings.TrimPrefix(p.Path, "entries[0].")
				reasons = append(reasons, p.String())
			}
		}
		note("left out: " + cmp.Or(strings.Join(reasons, ", "), err.Error()))
		return
	}
	l.entries = append(l.entries, out)
}

func idText(id *types.SPIFFEID) string { return "spiffe://" + id.GetTrustDomain() + id.GetPath() }

// report returns the lines for standard error: what was not converted, then the numbers.
func (l *imported) report() string {
	lines := l.notes
	if len(l.trustDomains) > 1 && l.trustDomain == "" {
		var each []string
		for _, td := range slices.Sorted(maps.Keys(l.trustDomains)) {
			each = append(each, fmt.Sprintf("%q has %d", td, l.trustDomains[td]))
		}
		lines = append(lines, fmt.Sprintf("The entries are of %d trust domains, and a server takes those of its own: %s. Choose one with --trust-domain.", len(each), strings.Join(each, ", ")))
	}
	if len(l.joined) > 0 {
		lines = append(lines, fmt.Sprintf("Agents that join with a join token get another ID at this server: change parent_id of %s.", selector.List(l.joined)))
	}
	for _, w := range selectorWarnings(l.entries) {
		lines = append(lines, "Warning: "+w)
	}
	numbers := fmt.Sprintf("%d entries read, %d written, %d left out", l.read, len(l.entries), l.read-len(l.entries))
	for _, a := range notCarriedOver {
		if n := l.counts[a.name]; n > 0 {
			numbers += fmt.Sprintf("; %d with %s", n, a.name)
		}
	}
	return cli.PrintableLines(strings.Join(append(lines, numbers), "\n")) + "\n"
}

// unknown returns the names of those fields of a message in JSON that are set and that the
// message does not have: an older program drops what a newer server prints.
func unknown(message protoreflect.MessageDescriptor, raw json.RawMessage) (names []string) {
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		return nil // null
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		field := message.Fields().ByTextName(name)
		if field == nil {
			field = message.Fields().ByJSONName(name)
		}
		switch {
		case field == nil && !slices.Contains([]string{"null", "false", "0", `"0"`, `""`, "[]", "{}"}, string(fields[name])):
			names = append(names, name)
		case field != nil && field.Message() != nil && !field.IsList():
			for _, inner := range unknown(field.Message(), fields[name]) {
				names = append(names, name+"."+inner)
			}
		}
	}
	return names
}
