package x509pop

import (
	"crypto/x509"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig/v3"
)

// templateData is what a template can use, with the names that it has in SPIRE.
type templateData struct {
	*x509.Certificate
	SerialNumberHex string
	Fingerprint     string
	PluginName      string
	TrustDomain     string
	SVIDPathTrimmed string
	URISanSelectors map[string]string
}

// functions are the names of sprig's functions in templates: those that SPIRE allows,
// which do not read the environment, the network or the time.
const functions = `abbrev abbrevboth trunc trim upper lower title untitle substr repeat trimAll
trimSuffix trimPrefix nospace initials swapcase snakecase camelcase kebabcase wrap wrapWith
contains hasPrefix hasSuffix quote squote cat indent nindent replace plural sha1sum sha256sum
adler32sum toString seq splitList toStrings join sortAlpha default empty coalesce all any compact
mustCompact ternary base dir clean ext isAbs b64enc b64dec b32enc b32dec tuple list dict get set
unset hasKey pluck keys pick omit merge mergeOverwrite mustMerge mustMergeOverwrite values append
push mustAppend mustPush prepend mustPrepend first mustFirst rest mustRest last mustLast initial
mustInitial reverse mustReverse uniq mustUniq without mustWithout has mustHas slice mustSlice concat
dig chunk mustChunk uuidv4 fail regexMatch mustRegexMatch regexFindAll mustRegexFindAll regexFind
mustRegexFind regexReplaceAll mustRegexReplaceAll regexReplaceAllLiteral mustRegexReplaceAllLiteral
regexSplit mustRegexSplit regexQuoteMeta urlParse urlJoin`

// ParseTemplate parses a template of agent IDs' paths, such as
// "/x509pop/cn/{{ .Subject.CommonName }}". It is one of text/template, with the fields of
// the node's [x509.Certificate] and .SerialNumberHex, .Fingerprint, .PluginName,
// .TrustDomain, .SVIDPathTrimmed and .URISanSelectors, and with most functions of sprig, as
// in SPIRE. A key that a certificate does not have makes the attestation fail.
func ParseTemplate(text string) (*template.Template, error) {
	allowed := template.FuncMap{}
	all := sprig.TxtFuncMap()
	for name := range strings.FieldsSeq(functions) {
		allowed[name] = all[name]
	}
	return template.New("agent path").Option("missingkey=error").Funcs(allowed).Parse(text)
}
