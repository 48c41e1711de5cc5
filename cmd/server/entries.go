package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/selector"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// shownEntry is an entry as it is printed, with the field names of the file.
type shownEntry struct {
	ID            string   `json:"id"`
	SPIFFEID      string   `json:"spiffe_id"`
	ParentID      string   `json:"parent_id,omitempty"`
	Operator      bool     `json:"operator,omitempty"`
	Selectors     []string `json:"selectors"`
	Hint          string   `json:"hint,omitempty"`
	FederatesWith []string `json:"federates_with,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	X509TTL       string   `json:"x509_ttl,omitempty"`
	JWTTTL        string   `json:"jwt_ttl,omitempty"`
	ExpiresAt     string   `json:"expires_at,omitempty"`

	DisableX509SVIDPrefetch bool `json:"disable_x509_svid_prefetch,omitempty"`
	JWTSVIDIncludeJTI       bool `json:"jwt_svid_include_jti,omitempty"`
}

func showEntry(e *api.Entry) *shownEntry {
	if e == nil {
		return nil
	}
	out := &shownEntry{
		ID: e.GetId(), SPIFFEID: e.GetSpiffeId(), ParentID: e.GetParentId(), Operator: e.GetOperator(), Hint: e.GetHint(),
		Selectors: []string{}, FederatesWith: e.GetFederatesWith(), DNSNames: e.GetDnsNames(),
		X509TTL: lifetime(e.GetX509Ttl()), JWTTTL: lifetime(e.GetJwtTtl()),
		DisableX509SVIDPrefetch: e.GetDisableX509SvidPrefetch(), JWTSVIDIncludeJTI: e.GetJwtSvidIncludeJti(),
	}
	if at := e.GetExpiresAt(); at != nil {
		out.ExpiresAt = at.AsTime().Format(time.RFC3339)
	}
	for _, s := range e.GetSelectors() {
		out.Selectors = append(out.Selectors, s.GetType()+":"+s.GetValue())
	}
	return out
}

// attributes lists the attributes that are set, with the field names of the file.
func (e *shownEntry) attributes() []string {
	var out []string
	if e.DisableX509SVIDPrefetch {
		out = append(out, "disable_x509_svid_prefetch")
	}
	if e.JWTSVIDIncludeJTI {
		out = append(out, "jwt_svid_include_jti")
	}
	return out
}

func lifetime(d *durationpb.Duration) string {
	if d.AsDuration() == 0 {
		return ""
	}
	return config.Short(d.AsDuration())
}

// entriesCommand is "entries list".
func entriesCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call, "yaml")
	agent := c.Flags.String("agent", "", "")
	if _, err := c.Parse(); err != nil {
		return err
	}
	if *agent != "" && c.Format() == "yaml" {
		return cli.Usagef("%s: -o yaml prints a file for apply, which would remove the entries of other agents: omit --agent, or use -o json", c.Name())
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ListEntries(ctx, &api.ListEntriesRequest{Scope: c.scope(), AgentId: *agent}, large)
		if err != nil {
			return err
		}
		entries := make([]*shownEntry, 0, len(resp.GetEntries()))
		for _, e := range resp.GetEntries() {
			entries = append(entries, showEntry(e))
		}
		warnings := selectorWarnings(entries)
		switch c.Format() {
		case "json":
			return cli.PrintJSON(c.Stdout, shownEntries{entries, warnings})
		case "yaml":
			return errors.Join(printFile(c.Stdout, entries), printWarnings(c.Stderr, warnings))
		}
		table := cli.NewTable(c.Stdout)
		_, _ = fmt.Fprint(table, "ID\tSPIFFE ID\tSELECTORS\tDNS NAMES\tPARENT ID\tX.509 TTL\tJWT TTL\tEXPIRES AT\tATTRIBUTES\n")
		for _, e := range entries {
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", text(e.ID), text(e.SPIFFEID), text(strings.Join(e.Selectors, " ")),
				text(strings.Join(e.DNSNames, " ")), text(e.ParentID), text(e.X509TTL), text(e.JWTTTL), text(e.ExpiresAt), text(strings.Join(e.attributes(), " ")))
		}
		return errors.Join(cli.Flush(table), printWarnings(c.Stderr, warnings))
	})
}

type shownEntries struct {
	Entries  []*shownEntry `json:"entries"`
	Warnings []string      `json:"warnings,omitempty"`
}

// printFile prints entries as a file that "entries apply" takes.
func printFile(w io.Writer, entries []*shownEntry) error {
	if len(entries) == 0 {
		return cli.Printf(w, "entries: []\n")
	}
	var out strings.Builder
	out.WriteString("entries:\n")
	for _, e := range entries {
		before := "- "
		field := func(name, value string) {
			if value != "" {
				out.WriteString(before + name + ": " + value + "\n")
				before = "  "
			}
		}
		list := func(name string, items []string) {
			if len(items) > 0 {
				out.WriteString(before + name + ":\n")
				before = "  "
			}
			for _, item := range items {
				out.WriteString("  - " + scalar(item) + "\n")
			}
		}
		field("id", scalar(e.ID))
		field("spiffe_id", scalar(e.SPIFFEID))
		field("parent_id", scalar(e.ParentID))
		field("operator", yes(e.Operator))
		list("selectors", e.Selectors)
		field("hint", scalar(e.Hint))
		list("federates_with", e.FederatesWith)
		list("dns_names", e.DNSNames)
		field("x509_ttl", e.X509TTL)
		field("jwt_ttl", e.JWTTTL)
		field("expires_at", scalar(e.ExpiresAt))
		field("disable_x509_svid_prefetch", yes(e.DisableX509SVIDPrefetch))
		field("jwt_svid_include_jti", yes(e.JWTSVIDIncludeJTI))
	}
	return cli.Printf(w, "%s", out.String())
}

// plain are strings that YAML reads as strings without quotes, except for words.
var plain = regexp.MustCompile(`^[A-Za-z/]([\w./:@=-]*[\w/-])?$`)

// scalar returns a string as YAML has it; nothing for an empty one. What Go escapes in quotes
// is escaped in the same way in YAML (1.2, section 5.7), as far as strings are UTF-8.
func scalar(s string) string {
	words := []string{"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
	if s == "" || plain.MatchString(s) && !slices.Contains(words, strings.ToLower(s)) {
		return s
	}
	return strconv.Quote(s)
}

// selectorWarnings returns what is wrong with the selectors of entries.
func selectorWarnings(entries []*shownEntry) []string {
	return selector.Warnings(func(yield func(selector.Entry) bool) {
		for _, e := range entries {
			parent, _ := spiffeid.FromString(e.ParentID) // zero if there is none
			of := spireapi.Entry{ParentID: parent}
			if !yield(selector.Entry{Name: cmp.Or(e.ID, e.SPIFFEID), Alias: of.IsAlias(), Selectors: e.Selectors}) {
				return
			}
		}
	})
}

func printWarnings(w io.Writer, warnings []string) error {
	for _, warning := range warnings {
		if err := cli.Printf(w, "Warning: %s\n", text(warning)); err != nil {
			return err
		}
	}
	return nil
}

// applyCommand is "entries apply".
func applyCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	dryRun := c.Flags.Bool("dry-run", false, "")
	var remove *int64
	c.Flags.Func("remove", "", func(text string) error {
		n, err := strconv.ParseUint(text, 10, 31)
		if err != nil {
			return errors.New("give the number of entries")
		}
		remove = new(int64(n))
		return nil
	})
	file, err := c.Parse("file")
	if err != nil {
		return err
	}
	entries, err := loadEntries(call, file[0])
	if err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ApplyEntries(ctx, &api.ApplyEntriesRequest{Scope: c.scope(), Entries: entries, DryRun: *dryRun, Remove: remove}, large)
		if err != nil {
			return err
		}
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, showChanges(resp, *dryRun))
		}
		if err := printChanges(c.Stdout, resp, *dryRun); err != nil {
			return err
		}
		return printWarnings(c.Stderr, resp.GetWarnings())
	})
}

// The kinds of changes.
const (
	added   = "added"
	changed = "changed"
	removed = "removed"
)

func kindOf(c *api.EntryChange) string {
	switch {
	case c.GetBefore() == nil:
		return added
	case c.GetAfter() == nil:
		return removed
	}
	return changed
}

type shownChange struct {
	Change string      `json:"change"`
	Before *shownEntry `json:"before,omitempty"`
	After  *shownEntry `json:"after,omitempty"`
}

type shownChanges struct {
	Changes   []shownChange `json:"changes"`
	Unchanged int64         `json:"unchanged"`
	Warnings  []string      `json:"warnings,omitempty"`
	DryRun    bool          `json:"dry_run"`
}

func showChanges(resp *api.ApplyEntriesResponse, dryRun bool) shownChanges {
	out := shownChanges{Changes: []shownChange{}, Unchanged: resp.GetUnchanged(), Warnings: resp.GetWarnings(), DryRun: dryRun}
	for _, c := range resp.GetChanges() {
		out.Changes = append(out.Changes, shownChange{kindOf(c), showEntry(c.GetBefore()), showEntry(c.GetAfter())})
	}
	return out
}

// printChanges prints each change and their numbers.
func printChanges(w io.Writer, resp *api.ApplyEntriesResponse, dryRun bool) error {
	var out strings.Builder
	numbers := map[string]int{}
	for _, c := range resp.GetChanges() {
		kind, before, after := kindOf(c), showEntry(c.GetBefore()), showEntry(c.GetAfter())
		numbers[kind]++
		switch kind {
		case added:
			fmt.Fprintf(&out, "+ %s (%s)\n", text(after.ID), text(after.SPIFFEID))
		case removed:
			fmt.Fprintf(&out, "- %s (%s)\n", text(before.ID), text(before.SPIFFEID))
		default:
			fmt.Fprintf(&out, "~ %s (%s)\n", text(after.ID), text(after.SPIFFEID))
			difference(&out, before, after)
		}
	}
	note := ""
	if dryRun {
		note = " (dry run: nothing was changed)"
	}
	return cli.Printf(w, "%s%d added, %d changed, %d removed, %d unchanged%s\n", out.String(),
		numbers[added], numbers[changed], numbers[removed], resp.GetUnchanged(), note)
}

// difference prints the fields that differ, with the field names of the file.
func difference(out *strings.Builder, before, after *shownEntry) {
	for _, f := range []struct{ name, before, after string }{
		{"spiffe_id", before.SPIFFEID, after.SPIFFEID},
		{"parent_id", before.ParentID, after.ParentID},
		{"operator", yes(before.Operator), yes(after.Operator)},
		{"hint", before.Hint, after.Hint},
		{"dns_names", strings.Join(before.DNSNames, " "), strings.Join(after.DNSNames, " ")}, // the order counts
		{"x509_ttl", before.X509TTL, after.X509TTL},
		{"jwt_ttl", before.JWTTTL, after.JWTTTL},
		{"expires_at", before.ExpiresAt, after.ExpiresAt},
		{"disable_x509_svid_prefetch", yes(before.DisableX509SVIDPrefetch), yes(after.DisableX509SVIDPrefetch)},
		{"jwt_svid_include_jti", yes(before.JWTSVIDIncludeJTI), yes(after.JWTSVIDIncludeJTI)},
	} {
		if f.before != f.after {
			fmt.Fprintf(out, "    %s: %s -> %s\n", f.name, orNone(f.before), orNone(f.after))
		}
	}
	for _, f := range []struct {
		name          string
		before, after []string
	}{
		{"selectors", before.Selectors, after.Selectors},
		{"federates_with", before.FederatesWith, after.FederatesWith},
	} {
		for _, item := range f.before {
			if !slices.Contains(f.after, item) {
				fmt.Fprintf(out, "    %s: - %s\n", f.name, text(item))
			}
		}
		for _, item := range f.after {
			if !slices.Contains(f.before, item) {
				fmt.Fprintf(out, "    %s: + %s\n", f.name, text(item))
			}
		}
	}
}

func yes(set bool) string {
	if set {
		return "true"
	}
	return ""
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return cli.Printable(s)
}
