#include "worker/log/expression.h"

#include <cctype>
#include <charconv>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/job/config.h"

namespace hearth {

namespace {

constexpr int kDepthMax = 200;  // of nesting, so that a hostile expression cannot exhaust the stack

enum class Op {
  kNumber,
  kText,
  kColumn,
  kNegate,
  kNot,
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kModulo,
  kEqual,
  kNotEqual,
  kLess,
  kLessOrEqual,
  kGreater,
  kGreaterOrEqual,
  kAnd,
  kOr,
  kMin,
  kMax,
  kAbs,
  kLog1p,
  kFloor,
  kIf,
  kMissing
};

// `order`: less than, equal to, greater than 0 as the left side is to the right one.
bool Holds(Op op, int order) {
  switch (op) {
    case Op::kEqual:
      return order == 0;
    case Op::kNotEqual:
      return order != 0;
    case Op::kLess:
      return order < 0;
    case Op::kLessOrEqual:
      return order <= 0;
    case Op::kGreater:
      return order > 0;
    case Op::kGreaterOrEqual:
      return order >= 0;
    default:
      return false;
  }
}

bool IsComparison(Op op) { return op >= Op::kEqual && op <= Op::kGreaterOrEqual; }

}  // namespace

struct Expression::Node {
  Op op = Op::kNumber;
  Number number;
  std::string text;      // kText
  int column = 0;        // kColumn, kMissing
  bool as_text = false;  // a comparison of texts
  std::vector<std::unique_ptr<const Node>> operands;
};

namespace {

using Node = Expression::Node;
using NodePtr = std::unique_ptr<const Node>;

absl::string_view TextOf(const Node& node, absl::Span<const absl::string_view> fields) {
  return node.op == Op::kText ? absl::string_view(node.text) : fields[node.column];
}

// One record's fields, and where columns go that hold no number.
struct Record {
  absl::Span<const absl::string_view> fields;
  std::vector<int>* unreadable;
};

Number Value(const Node& node, const Record& record) {
  const auto operand = [&](int i) { return Value(*node.operands[i], record); };
  switch (node.op) {
    case Op::kNumber:
      return node.number;
    case Op::kText:
      return Number();  // the parser lets texts stand in comparisons alone
    case Op::kColumn: {
      Number number;
      const NumberText text = ReadNumber(record.fields[node.column], &number);
      if (text == NumberText::kUnreadable && record.unreadable != nullptr) record.unreadable->push_back(node.column);
      return number;
    }
    case Op::kNegate:
      return Negate(operand(0));
    case Op::kNot: {
      const Number a = operand(0);
      return a.missing() ? a : Number::OfTruth(!a.True());
    }
    case Op::kAdd:
      return Add(operand(0), operand(1));
    case Op::kSubtract:
      return Subtract(operand(0), operand(1));
    case Op::kMultiply:
      return Multiply(operand(0), operand(1));
    case Op::kDivide:
      return Divide(operand(0), operand(1));
    case Op::kModulo:
      return Modulo(operand(0), operand(1));
    case Op::kEqual:
    case Op::kNotEqual:
    case Op::kLess:
    case Op::kLessOrEqual:
    case Op::kGreater:
    case Op::kGreaterOrEqual: {
      if (node.as_text) {
        const absl::string_view a = TextOf(*node.operands[0], record.fields);
        return Number::OfTruth(Holds(node.op, a.compare(TextOf(*node.operands[1], record.fields))));
      }
      const Number a = operand(0), b = operand(1);
      return a.missing() || b.missing() ? Number() : Number::OfTruth(Holds(node.op, Compare(a, b)));
    }
    // One side may decide alone; else what is missing on either side is missing in the whole.
    case Op::kAnd:
    case Op::kOr: {
      const bool decides = node.op == Op::kOr;
      const Number a = operand(0);
      if (!a.missing() && a.True() == decides) return Number::OfTruth(decides);
      const Number b = operand(1);
      if (!b.missing() && b.True() == decides) return Number::OfTruth(decides);
      return a.missing() || b.missing() ? Number() : Number::OfTruth(!decides);
    }
    case Op::kMin:
    case Op::kMax: {
      const Number a = operand(0), b = operand(1);
      if (a.missing() || b.missing()) return Number();
      return (node.op == Op::kMin) == (Compare(a, b) < 0) ? a : b;
    }
    case Op::kAbs: {
      const Number a = operand(0);
      if (!a.integer()) return Number::OfReal(std::fabs(a.ToDouble()));
      return a.ToInteger() < 0 ? Negate(a) : a;
    }
    case Op::kLog1p:
      return Number::OfReal(std::log1p(operand(0).ToDouble()));
    case Op::kFloor: {
      const Number a = operand(0);
      return a.integer() ? a : Number::OfReal(std::floor(a.ToDouble()));
    }
    case Op::kIf:
      return operand(0).True() ? operand(1) : operand(2);
    case Op::kMissing:
      return Number::OfTruth(record.fields[node.column].empty());
  }
  return Number();
}

struct Function {
  absl::string_view name;
  Op op;
  int operands;
};
constexpr Function kFunctions[] = {{"min", Op::kMin, 2},        {"max", Op::kMax, 2},     {"abs", Op::kAbs, 1},
                                   {"log1p", Op::kLog1p, 1},    {"floor", Op::kFloor, 1}, {"if", Op::kIf, 3},
                                   {"missing", Op::kMissing, 1}};

struct Symbol {
  absl::string_view text;  // longer ones first
  Op op;
};
constexpr Symbol kComparisons[] = {{"==", Op::kEqual},          {"!=", Op::kNotEqual}, {"<=", Op::kLessOrEqual},
                                   {">=", Op::kGreaterOrEqual}, {"<", Op::kLess},      {">", Op::kGreater}};
constexpr Symbol kSums[] = {{"+", Op::kAdd}, {"-", Op::kSubtract}};
constexpr Symbol kProducts[] = {{"*", Op::kMultiply}, {"/", Op::kDivide}, {"%", Op::kModulo}};

// Recursive descent, one method a line of the grammar.
class Parser {
 public:
  Parser(absl::string_view text, const Expression::Columns& columns) : text_(text), columns_(columns) {}

  absl::StatusOr<NodePtr> Parse() {
    HEARTH_ASSIGN_OR_RETURN(NodePtr root, Or());
    SkipSpace();
    if (at_ != text_.size()) return Error("an operator or the end");
    HEARTH_RETURN_IF_ERROR(NotText(*root, 0));
    return root;
  }

 private:
  absl::Status ErrorAt(size_t at, absl::string_view cause) const {
    return absl::InvalidArgumentError(absl::StrCat("expression \"", text_, "\", position ", at + 1, ": ", cause));
  }
  absl::Status Error(absl::string_view expected) const {
    return ErrorAt(at_, absl::StrCat("expected ", expected, ", found ",
                                     at_ < text_.size() ? absl::StrCat("'", text_.substr(at_, 1), "'") : "the end"));
  }
  void SkipSpace() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  bool Take(absl::string_view symbol) {
    SkipSpace();
    if (text_.substr(at_, symbol.size()) != symbol) return false;
    at_ += symbol.size();
    return true;
  }
  template <size_t n>
  const Symbol* TakeOneOf(const Symbol (&symbols)[n]) {
    for (const Symbol& symbol : symbols) {
      if (Take(symbol.text)) return &symbol;
    }
    return nullptr;
  }
  absl::Status NotText(const Node& node, size_t at) const {
    if (node.op != Op::kText) return absl::OkStatus();
    return ErrorAt(at, "a 'string' may only be compared with a column or a string");
  }
  absl::StatusOr<NodePtr> Binary(Op op, NodePtr left, NodePtr right, size_t left_at, size_t right_at) const {
    auto node = std::make_unique<Node>();
    node->op = op;
    const bool text = left->op == Op::kText || right->op == Op::kText;
    if (text && !IsComparison(op)) {
      HEARTH_RETURN_IF_ERROR(NotText(*left, left_at));
      HEARTH_RETURN_IF_ERROR(NotText(*right, right_at));
    }
    for (const auto& [side, at] : {std::make_pair(left.get(), left_at), std::make_pair(right.get(), right_at)}) {
      if (text && side->op != Op::kText && side->op != Op::kColumn) {
        return ErrorAt(at, "a 'string' may only be compared with a column or a string");
      }
    }
    node->as_text = text;
    node->operands.push_back(std::move(left));
    node->operands.push_back(std::move(right));
    return NodePtr(std::move(node));
  }

  absl::StatusOr<NodePtr> Or() {
    if (++depth_ > kDepthMax) return ErrorAt(at_, absl::StrCat("nested more than ", kDepthMax, " deep"));
    SkipSpace();
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr left, And());
    while (Take("||")) {
      SkipSpace();
      const size_t at = at_;
      HEARTH_ASSIGN_OR_RETURN(NodePtr right, And());
      HEARTH_ASSIGN_OR_RETURN(left, Binary(Op::kOr, std::move(left), std::move(right), start, at));
    }
    --depth_;
    return left;
  }
  absl::StatusOr<NodePtr> And() {
    SkipSpace();
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr left, Comparison());
    while (Take("&&")) {
      SkipSpace();
      const size_t at = at_;
      HEARTH_ASSIGN_OR_RETURN(NodePtr right, Comparison());
      HEARTH_ASSIGN_OR_RETURN(left, Binary(Op::kAnd, std::move(left), std::move(right), start, at));
    }
    return left;
  }
  absl::StatusOr<NodePtr> Comparison() {
    SkipSpace();
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr left, Sum());
    const Symbol* symbol = TakeOneOf(kComparisons);
    if (symbol == nullptr) return left;
    SkipSpace();
    const size_t at = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr right, Sum());
    HEARTH_ASSIGN_OR_RETURN(NodePtr both, Binary(symbol->op, std::move(left), std::move(right), start, at));
    SkipSpace();
    const size_t after = at_;
    if (TakeOneOf(kComparisons) != nullptr) return ErrorAt(after, "comparisons do not chain; join them with &&");
    return both;
  }
  absl::StatusOr<NodePtr> Sum() {
    SkipSpace();
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr left, Product());
    while (const Symbol* symbol = TakeOneOf(kSums)) {
      SkipSpace();
      const size_t at = at_;
      HEARTH_ASSIGN_OR_RETURN(NodePtr right, Product());
      HEARTH_ASSIGN_OR_RETURN(left, Binary(symbol->op, std::move(left), std::move(right), start, at));
    }
    return left;
  }
  absl::StatusOr<NodePtr> Product() {
    SkipSpace();
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(NodePtr left, Unary());
    while (const Symbol* symbol = TakeOneOf(kProducts)) {
      SkipSpace();
      const size_t at = at_;
      HEARTH_ASSIGN_OR_RETURN(NodePtr right, Unary());
      HEARTH_ASSIGN_OR_RETURN(left, Binary(symbol->op, std::move(left), std::move(right), start, at));
    }
    return left;
  }
  absl::StatusOr<NodePtr> Unary() {
    SkipSpace();
    const bool is_not = at_ < text_.size() && text_[at_] == '!' && text_.substr(at_, 2) != "!=";
    if (!is_not && !(at_ < text_.size() && text_[at_] == '-')) return Atom();
    if (++depth_ > kDepthMax) return ErrorAt(at_, absl::StrCat("nested more than ", kDepthMax, " deep"));
    ++at_;
    SkipSpace();
    const size_t at = at_;
    auto node = std::make_unique<Node>();
    node->op = is_not ? Op::kNot : Op::kNegate;
    HEARTH_ASSIGN_OR_RETURN(NodePtr operand, Unary());
    HEARTH_RETURN_IF_ERROR(NotText(*operand, at));
    node->operands.push_back(std::move(operand));
    --depth_;
    return NodePtr(std::move(node));
  }
  absl::StatusOr<NodePtr> Atom() {
    SkipSpace();
    if (at_ == text_.size()) return Error("a number, 'string', column or (");
    const char c = text_[at_];
    if (Take("(")) {
      HEARTH_ASSIGN_OR_RETURN(NodePtr inner, Or());
      if (!Take(")")) return Error("')'");
      return inner;
    }
    if (c == '\'') return Text();
    if (c == '`') return Column();
    if (std::isdigit(static_cast<unsigned char>(c)) || c == '.') return Number();
    if (std::isalpha(static_cast<unsigned char>(c)) || c == '_') return ColumnOrFunction();
    return Error("a number, 'string', column or (");
  }
  absl::StatusOr<NodePtr> Number() {
    auto node = std::make_unique<Node>();
    double value;
    const auto result = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (result.ec == std::errc::invalid_argument) return Error("a number");
    const absl::string_view text(text_.data() + at_, static_cast<size_t>(result.ptr - (text_.data() + at_)));
    if (ReadNumber(text, &node->number) != NumberText::kNumber) return ErrorAt(at_, "a number that no double holds");
    at_ = static_cast<size_t>(result.ptr - text_.data());
    return NodePtr(std::move(node));
  }
  absl::StatusOr<NodePtr> Text() {
    auto node = std::make_unique<Node>();
    node->op = Op::kText;
    const size_t end = text_.find('\'', at_ + 1);
    if (end == absl::string_view::npos) return ErrorAt(at_, "this string lacks its closing '");
    node->text = std::string(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return NodePtr(std::move(node));
  }
  absl::StatusOr<absl::string_view> Name() {
    if (text_[at_] == '`') {
      const size_t end = text_.find('`', at_ + 1);
      if (end == absl::string_view::npos) return ErrorAt(at_, "this name lacks its closing `");
      const absl::string_view name = text_.substr(at_ + 1, end - at_ - 1);
      at_ = end + 1;
      return name;
    }
    const size_t start = at_;
    while (at_ < text_.size() &&
           (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_' || text_[at_] == '.')) {
      ++at_;
    }
    return text_.substr(start, at_ - start);
  }
  absl::StatusOr<NodePtr> Column() {
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(const absl::string_view name, Name());
    auto node = std::make_unique<Node>();
    node->op = Op::kColumn;
    node->column = columns_(name);
    if (node->column < 0) return ErrorAt(start, absl::StrCat("there is no column \"", name, "\""));
    return NodePtr(std::move(node));
  }
  absl::StatusOr<NodePtr> ColumnOrFunction() {
    const size_t start = at_;
    HEARTH_ASSIGN_OR_RETURN(const absl::string_view name, Name());
    if (!Take("(")) {
      at_ = start;
      return Column();
    }
    const Function* function = nullptr;
    for (const Function& known : kFunctions) {
      if (known.name == name) function = &known;
    }
    if (function == nullptr) {
      return ErrorAt(start,
                     absl::StrCat("there is no function \"", name, "\"; there are min max abs log1p floor if missing"));
    }
    return Call(*function);
  }
  absl::StatusOr<NodePtr> Call(const Function& function) {
    auto node = std::make_unique<Node>();
    node->op = function.op;
    for (int i = 0; i < function.operands; ++i) {
      if (i > 0 && !Take(",")) return Error(absl::StrCat("',' (", function.name, " takes ", function.operands, ")"));
      SkipSpace();
      const size_t at = at_;
      HEARTH_ASSIGN_OR_RETURN(NodePtr operand, Or());
      if (function.op == Op::kMissing) {
        if (operand->op != Op::kColumn) return ErrorAt(at, "missing() takes the name of a column");
        node->column = operand->column;
      }
      HEARTH_RETURN_IF_ERROR(NotText(*operand, at));
      node->operands.push_back(std::move(operand));
    }
    if (!Take(")")) return Error(absl::StrCat("')' (", function.name, " takes ", function.operands, ")"));
    return NodePtr(std::move(node));
  }

  const absl::string_view text_;
  const Expression::Columns& columns_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

absl::StatusOr<Expression> Expression::Parse(absl::string_view text, const Columns& columns) {
  if (text.size() > kExpressionBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("expression \"", text.substr(0, 40), "…\" is ", text.size(),
                                                   " bytes long, more than ", kExpressionBytesMax, "; shorten it"));
  }
  HEARTH_ASSIGN_OR_RETURN(NodePtr root, Parser(text, columns).Parse());
  Expression expression;
  expression.root_ = std::move(root);
  return expression;
}

Number Expression::Evaluate(absl::Span<const absl::string_view> fields, std::vector<int>* unreadable) const {
  return Value(*root_, {fields, unreadable});
}

absl::StatusOr<std::vector<std::string>> Expression::ColumnsOf(absl::string_view text) {
  std::vector<std::string> names;
  const Columns collect = [&](absl::string_view name) {
    names.emplace_back(name);
    return 0;
  };
  HEARTH_RETURN_IF_ERROR(Parse(text, collect).status());
  return names;
}

}  // namespace hearth
