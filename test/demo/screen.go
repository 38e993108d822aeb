package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// screen writes the story for a person: titles, one line per step, and the
// tables of kubectl-quarry. Colours only where a terminal shows them.
type screen struct {
	out    io.Writer
	colour bool
	step   int
}

func newScreen(f *os.File) *screen {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &screen{out: f, colour: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

const (
	bold   = "1"
	dim    = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

func (s *screen) paint(colour, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (s *screen) title(format string, args ...any) {
	fmt.Fprintf(s.out, "\n%s\n", s.paint(bold, fmt.Sprintf(format, args...)))
}

func (s *screen) note(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(s.out, "      %s\n", s.paint(dim, strings.TrimRight(line, "\n")))
	}
}

// done prints one step: number, what was done, how, how long. how may be empty.
func (s *screen) done(what, how string, took time.Duration) {
	s.step++
	fmt.Fprintf(s.out, "  %2d  %-58s %10s", s.step, what, round(took))
	switch {
	case strings.HasPrefix(how, "native"):
		fmt.Fprintf(s.out, "  %s", s.paint(green, how))
	case strings.HasPrefix(how, "default"):
		fmt.Fprintf(s.out, "  %s", s.paint(yellow, how))
	case how != "":
		fmt.Fprintf(s.out, "  %s", s.paint(dim, how))
	}
	fmt.Fprintln(s.out)
}

// proved prints a line for something that was checked and is so.
func (s *screen) proved(format string, args ...any) {
	fmt.Fprintf(s.out, "   %s  %s\n", s.paint(green, "ok"), fmt.Sprintf(format, args...))
}

// table prints a command and what it said.
func (s *screen) table(command, text string) {
	fmt.Fprintf(s.out, "\n      %s\n", s.paint(cyan, "$ "+command))
	for line := range strings.Lines(text) {
		fmt.Fprintf(s.out, "      %s\n", strings.TrimRight(line, "\n"))
	}
	fmt.Fprintln(s.out)
}

func (s *screen) failed(err error) {
	fmt.Fprintf(s.out, "\n%s %v\n", s.paint(red, "failed:"), err)
}

func round(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	default:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	}
}

func size(n int64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<30:
		return fmt.Sprintf("%.2f GiB", float64(n)/(1<<30))
	default:
		return fmt.Sprintf("%d MiB", n>>20)
	}
}
