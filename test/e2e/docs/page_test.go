package docs

import (
	"fmt"
	"os"
	"strings"
)

// part of a page: a command, or a file.
type part struct {
	section string // the heading above it
	line    int
	// command is one line of a console block, or a command in the text; without its prompt and its comment.
	command string
	says    string // what the block has below it
	inText  bool
	// name and text of a file: a block that begins with a comment that names it.
	name, text string
}

// programs are what commands in the text begin with. Of these two words or more are a command.
var programs = []string{"kubectl", "helm", "docker", "ctr", "hack/image", "hack/cluster", "quarry", "make"}

// read gives the parts of a page. Blocks that are neither commands nor named files are returned
// as other, for the caller to know them all.
func read(path string) (parts []part, other []part, _ error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	var section, language string
	var block []string
	began := 0
	for i, line := range strings.Split(string(text), "\n") {
		n := i + 1
		switch {
		case strings.HasPrefix(line, "```") && language == "":
			language, block, began = strings.TrimPrefix(line, "```"), nil, n
			if language == "" {
				language = "text"
			}
		case line == "```":
			of := part{section: section, line: began, text: strings.Join(block, "\n") + "\n"}
			switch {
			case language == "console" || language == "sh":
				parts = append(parts, commands(section, began, block)...)
			case len(block) > 0 && named(block[0]):
				of.name = strings.TrimPrefix(block[0], "# ")
				parts = append(parts, of)
			default:
				other = append(other, of)
			}
			language = ""
		case language != "":
			block = append(block, line)
		case strings.HasPrefix(line, "#"):
			section = strings.TrimSpace(strings.TrimLeft(line, "#"))
		default:
			for _, c := range inText(line) {
				parts = append(parts, part{section: section, line: n, command: c, inText: true})
			}
		}
	}
	if language != "" {
		return nil, nil, fmt.Errorf("%s:%d: a block without an end", path, began)
	}
	return parts, other, nil
}

func named(line string) bool {
	name, ok := strings.CutPrefix(line, "# ")
	return ok && !strings.Contains(name, " ") && strings.Contains(name, ".")
}

// commands of a block: lines with a prompt, "$" or "#". A here-document goes with its command; what else
// has no prompt is what the command above says.
func commands(section string, began int, block []string) (out []part) {
	end := "" // of a here-document
	for i, line := range block {
		c, ok := strings.CutPrefix(line, "$ ")
		if !ok {
			c, ok = strings.CutPrefix(line, "# ")
		}
		switch {
		case end != "":
			out[len(out)-1].command += "\n" + line
			if line == end {
				end = ""
			}
		case ok:
			c, _, _ = strings.Cut(c, "  #")
			out = append(out, part{section: section, line: began + 1 + i, command: strings.TrimSpace(c)})
			if _, mark, here := strings.Cut(c, "<<'"); here {
				end = strings.TrimSuffix(mark, "'")
			}
		case len(out) > 0:
			out[len(out)-1].says += line + "\n"
		}
	}
	return out
}

// inText are the commands between backticks in a line.
func inText(line string) (out []string) {
	spans := strings.Split(line, "`")
	for i := 1; i < len(spans); i += 2 {
		words := strings.Fields(spans[i])
		if len(words) < 2 {
			continue
		}
		for _, p := range programs {
			if words[0] == p {
				out = append(out, spans[i])
			}
		}
	}
	return out
}
