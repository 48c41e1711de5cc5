package cli

import (
	"fmt"
	"strings"
)

// ManPage is a manual page (man-pages(7)) made of a program's help.
type ManPage struct {
	Name    string // as the program is installed
	Section string // 1, or 8 for a daemon
	// Usage is the help of the program. Its first sentence begins with the program's name
	// and says what it does; a paragraph says what the exit statuses are.
	Usage string
	// Commands are the help texts of the commands, by name.
	Commands []ManCommand
}

// ManCommand is the help of one command.
type ManCommand struct{ Name, Help string }

// exitStatus begins the paragraph about the exit status in a help text.
const exitStatus = "Exit status:"

// String returns the page as roff source.
func (m ManPage) String() string {
	var b strings.Builder
	first, _, _ := strings.Cut(strings.ReplaceAll(m.Usage, "\n", " "), ". ")
	_, short, _ := strings.Cut(strings.TrimSuffix(strings.TrimSpace(first), "."), " ")
	fmt.Fprintf(&b, ".TH %s %s\n.SH NAME\n%s \\- %s\n", strings.ToUpper(roff(m.Name)), m.Section, roff(m.Name), roff(short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n.I COMMAND\n[\\fIARGUMENT\\fR]... [\\fIFLAG\\fR]...\n", roff(m.Name))
	text, status := cutExitStatus(m.Usage)
	fmt.Fprintf(&b, ".SH DESCRIPTION\n%s", preformatted(text))
	if len(m.Commands) > 0 {
		b.WriteString(".SH COMMANDS\n")
	}
	for _, c := range m.Commands {
		fmt.Fprintf(&b, ".SS %s\n%s", roff(c.Name), preformatted(c.Help))
	}
	fmt.Fprintf(&b, ".SH EXIT STATUS\n%s", preformatted(status))
	return b.String()
}

// cutExitStatus takes the paragraph about the exit status out of a help text.
func cutExitStatus(help string) (rest, status string) {
	var kept []string
	for _, paragraph := range strings.Split(help, "\n\n") {
		if text, found := strings.CutPrefix(paragraph, exitStatus); found {
			status = strings.TrimSpace(text)
			continue
		}
		kept = append(kept, paragraph)
	}
	return strings.Join(kept, "\n\n"), status
}

// preformatted returns text as it is, without filling: help has tables and examples.
func preformatted(text string) string {
	return ".nf\n" + roff(strings.Trim(text, "\n")) + "\n.fi\n"
}

// roff escapes text. A line that begins with a dot or a quote would be a request.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}

// man prints the manual page of the program, for packages.
func (p *Program) man(e Env) error {
	page := ManPage{Name: "renewd-" + p.Name, Section: "8", Usage: p.Usage}
	for _, c := range p.Commands {
		page.Commands = append(page.Commands, ManCommand{c.Name, c.Help()})
	}
	return Printf(e.Stdout, "%s", page)
}
