package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
)

// shownRecord is a record of the audit log as -o json prints it. docs/operations.md describes
// each field.
type shownRecord struct {
	Number    uint64     `json:"number"`
	At        *time.Time `json:"at"`
	Kind      string     `json:"kind"`
	Actor     string     `json:"actor"`
	Operation string     `json:"operation"`
	Keyset    string     `json:"keyset_id,omitempty"`
	Entry     string     `json:"entry_id,omitempty"`
	Agent     string     `json:"agent_id,omitempty"`
	Hostname  string     `json:"hostname,omitempty"`
	Label     string     `json:"label,omitempty"`
	Gone      bool       `json:"gone,omitempty"`
	// Before and After depend on the kind: map[string]string for keysets, *shownEntry,
	// *shownToken or *shownState; nil if there was or is nothing.
	Before any    `json:"before"`
	After  any    `json:"after"`
	Note   string `json:"note,omitempty"`

	changes []string // what changed, in words, a line each
}

// shownToken is a join token that was created.
type shownToken struct {
	ExpiresAt *time.Time `json:"expires_at"`
}

// shownState is the state of an agent: attested or banned.
type shownState struct {
	State string `json:"state"`
}

func showRecord(r *api.AuditRecord) *shownRecord {
	out := &shownRecord{
		Number: r.GetNumber(), At: moment(r.GetAt()), Kind: r.GetKind(), Actor: r.GetActor(), Operation: r.GetOperation(), Keyset: r.GetKeysetId(), Note: r.GetNote(),
	}
	switch {
	case r.GetEntry() != nil:
		out.showEntry(r.GetEntry())
	case r.GetToken() != nil:
		t := r.GetToken()
		out.Label, out.After = t.GetLabel(), &shownToken{moment(t.GetExpiresAt())}
		out.changes = []string{"expires " + utc(moment(t.GetExpiresAt()))}
	case r.GetAgent() != nil:
		out.showAgent(r.GetAgent())
	default:
		out.showKeysets(r)
	}
	return out
}

func (out *shownRecord) showEntry(c *api.EntryChange) {
	before, after := showEntry(c.GetBefore()), showEntry(c.GetAfter())
	switch kindOf(c) {
	case added:
		out.Entry, out.After = after.ID, after
		out.changes = []string{after.SPIFFEID}
	case removed:
		out.Entry, out.Before = before.ID, before
		out.changes = []string{before.SPIFFEID}
	default:
		out.Entry, out.Before, out.After = after.ID, before, after
		var lines strings.Builder
		difference(&lines, before, after)
		for line := range strings.Lines(lines.String()) {
			out.changes = append(out.changes, strings.TrimSpace(line))
		}
	}
}

func (out *shownRecord) showAgent(a *api.AuditAgent) {
	out.Agent, out.Hostname, out.Label, out.Gone = a.GetId(), a.GetHostname(), a.GetLabel(), a.GetGone()
	if a.GetBefore() != "" {
		out.Before = &shownState{a.GetBefore()}
	}
	if a.GetAfter() != "" {
		out.After = &shownState{a.GetAfter()}
	}
	if a.GetHostname() != "" {
		out.changes = append(out.changes, "hostname "+a.GetHostname())
	}
	state := func(s string) string {
		if s == "" {
			return "evicted"
		}
		return s
	}
	out.changes = append(out.changes, state(a.GetBefore())+" -> "+state(a.GetAfter()))
	if a.GetGone() {
		out.changes = append(out.changes, "gone: its SVIDs are no longer counted")
	}
}

func (out *shownRecord) showKeysets(r *api.AuditRecord) {
	before, after := map[string]string{}, map[string]string{}
	for _, s := range r.GetBefore() {
		before[s.GetKeysetId()] = s.GetState().String()
	}
	for _, s := range r.GetAfter() {
		after[s.GetKeysetId()] = s.GetState().String()
		if was := before[s.GetKeysetId()]; was != s.GetState().String() {
			out.changes = append(out.changes, s.GetKeysetId()+" "+title(was)+" -> "+title(s.GetState().String()))
		}
	}
	for _, s := range r.GetBefore() {
		if _, kept := after[s.GetKeysetId()]; !kept {
			out.changes = append(out.changes, s.GetKeysetId()+" "+title(s.GetState().String())+" -> gone")
		}
	}
	out.Before, out.After = before, after
}

// title formats a state like keysetctl; "none" if the keyset did not exist.
func title(state string) string {
	if state == "" {
		return "none"
	}
	return state[:1] + strings.ToLower(state[1:])
}

// auditCommand is "audit".
func auditCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	after := c.Flags.Uint64("after", 0, "")
	kinds := c.Flags.String("kind", "", "")
	if _, err := c.Parse(); err != nil {
		return err
	}
	req := &api.ReadAuditRequest{After: *after}
	for kind := range strings.SplitSeq(*kinds, ",") {
		if kind = strings.TrimSpace(kind); kind != "" {
			req.Kinds = append(req.Kinds, kind)
		}
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		req.Scope = c.scope()
		records := []*shownRecord{}
		for {
			resp, err := o.ReadAudit(ctx, req, large)
			if err != nil {
				return err
			}
			if len(resp.GetRecords()) == 0 {
				break
			}
			for _, r := range resp.GetRecords() {
				records = append(records, showRecord(r))
			}
			req.After = records[len(records)-1].Number
		}
		if len(req.GetKinds()) == 0 {
			if err := c.noteGap(*after, records); err != nil {
				return err
			}
		}
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, map[string]any{"records": records})
		}
		return printAudit(c.Stdout, records)
	})
}

// noteGap says that records were deleted, if numbers are missing after the given one.
func (c *client) noteGap(after uint64, records []*shownRecord) error {
	for _, r := range records {
		if after++; r.Number != after {
			return cli.Printf(c.Stderr, "Records from number %d on are missing: those of entries, tokens and agents are deleted when there are 200,000 later records.\n", after)
		}
	}
	return nil
}

// The layout of the audit log: a line for each record, and below it what changed and the
// note, so that it fits a terminal of 80 columns.
const (
	auditWidth  = 80
	auditIndent = "        " // the number's column
	auditActor  = 30         // the widest column of the actor
)

func printAudit(w io.Writer, records []*shownRecord) error {
	actor := len("ACTOR")
	for _, r := range records {
		if n := utf8.RuneCountInString(r.Actor); n <= auditActor {
			actor = max(actor, n)
		}
	}
	var out strings.Builder
	fmt.Fprintf(&out, "NUMBER  %-29s  %-*s  OPERATION\n", "TIME", actor, "ACTOR")
	for _, r := range records {
		head := fmt.Sprintf("%6d  %s  %-*s  %s", r.Number, utc(r.At), actor, text(r.Actor), text(r.Operation))
		about := cli.Printable(r.Keyset + r.Entry + r.Agent) // one of them
		switch {
		case about == "":
			about = cli.Printable(r.Label) // of a token
		case r.Label != "":
			about += " (" + cli.Printable(r.Label) + ")"
		}
		if about != "" && utf8.RuneCountInString(head)+1+utf8.RuneCountInString(about) <= auditWidth {
			head, about = head+" "+about, ""
		}
		out.WriteString(strings.TrimRight(head, " ") + "\n")
		for _, line := range append([]string{about}, append(r.changes, r.Note)...) {
			wrap(&out, cli.Printable(line))
		}
	}
	return cli.Printf(w, "%s", out.String())
}

// wrap writes a paragraph below a record; nothing if it is empty. It does not break a word.
func wrap(out *strings.Builder, paragraph string) {
	line := ""
	for word := range strings.FieldsSeq(paragraph) {
		switch {
		case line == "":
			line = auditIndent + word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > auditWidth:
			out.WriteString(line + "\n")
			line = auditIndent + "  " + word
		default:
			line += " " + word
		}
	}
	if line != "" {
		out.WriteString(line + "\n")
	}
}
